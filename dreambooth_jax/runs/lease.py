"""One run per workdir: a lease that the run holds, on a disk or in a bucket.

`lease.json` names the holder and the time of its last sign. Where holder and newcomer are on one machine, whether the
holder's process lives decides; elsewhere its last sign does. A stale lease is taken over without a question.

A bucket has no locks, renames or times that could be trusted; all that is asked of it is to make an object only where
none is, and to read one as it is now.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from dreambooth_jax.devices import runtime
from dreambooth_jax.files.atomic import create, is_remote, read_now, write_atomic

SIGN_SECONDS, STALE_SECONDS = 10.0, 60.0


class Held(ValueError):
    """Another run holds the workdir."""


def _machine() -> str:
    """Name of the host, its start, and the container's process numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> str:
    """Start time of a process, which tells it from a later one of the same number; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_alive(holder: dict[str, Any], now: float) -> bool:
    if holder.get("machine") == _machine() and holder.get("started"):
        return _started(int(holder["pid"])) == holder["started"]
    return now - float(holder.get("time", 0)) < STALE_SECONDS


def _read(path: epath.Path) -> dict[str, Any]:
    """The lease, or an empty one if there is none or it cannot be read."""
    try:
        found = json.loads(read_now(path))
        return found if isinstance(found, dict) and {"token", "pid", "time"} <= found.keys() else {}
    except Exception:  # the errors of buckets have no common type
        return {}


class Lease:
    """The lease of a workdir; `take` makes one.

    Attributes:
        release: gives it back; called twice it does nothing.
    """

    def __init__(self, path: epath.Path, sign_seconds: float, lost: Callable[[str], None]) -> None:
        self._path, self._sign_seconds, self._lost = path, sign_seconds, lost
        self._token, self._stop = secrets.token_hex(8), threading.Event()
        pid = os.getpid()
        self._holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": pid,
            "machine": _machine(),
            "started": _started(pid),
        }

    def _sign(self, write: Callable[[epath.Path, bytes], None] = write_atomic) -> None:
        write(self._path, json.dumps(self._holder | {"time": time.time()}).encode())

    def start(self) -> None:
        """Takes the lease and signs it again and again, in a thread of its own.

        Raises:
            FileExistsError: it lies in a bucket, and another process has just taken it.
        """
        self._sign(create if is_remote(self._path) else write_atomic)
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def _keep(self) -> None:
        while not self._stop.wait(self._sign_seconds):
            holder = _read(self._path)
            if holder and holder["token"] != self._token:
                self._lost(f"another run, process {holder['pid']} on {holder.get('host')}, has taken {self._path} over")
                return
            with contextlib.suppress(Exception):  # a full disk or a network that comes back; buckets have own errors
                self._sign()

    def release(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            with contextlib.suppress(Exception):  # as above
                if _read(self._path).get("token") == self._token:
                    self._path.unlink()


def _leave(reason: str) -> None:
    """Two runs must not write into one workdir: this one ends at once."""
    print(f"\nerror: {reason}; this run ends without saving", file=sys.stderr, flush=True)
    os._exit(1)


def take(
    workdir: str | os.PathLike, *, sign_seconds: float = SIGN_SECONDS, lost: Callable[[str], None] = _leave
) -> Lease:
    """Takes the lease of a workdir, which is made.

    Args:
        sign_seconds: time between two signs of life.
        lost: called with a sentence if another run takes the lease over, as it may if this one was suspended.

    Raises:
        Held: another run holds it; says which.
        OSError: the workdir cannot be written.
    """
    folder = epath.Path(workdir)
    path = folder / "lease.json"
    with _writing(workdir):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        holder = _read(path)
        if holder and _is_alive(holder, time.time()):
            raise Held(
                f"{workdir} is held by process {holder['pid']} on {holder.get('host')}, whose last sign is "
                f"{max(0, time.time() - holder['time']):.0f} s old. Stop that run, or give another --config.workdir; "
                f"the lease of a process that is gone ends after {STALE_SECONDS:.0f} s."
            )
        lease = Lease(path, sign_seconds, lost)
        with _writing(workdir):
            if is_remote(path):
                path.unlink(missing_ok=True)  # a stale one
            try:
                lease.start()
            except FileExistsError as error:
                raise Held(
                    f"{workdir}: another run was started at the same moment; give another --config.workdir"
                ) from error
    return lease


@contextlib.contextmanager
def holding(workdir: str | os.PathLike, at_exit: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Holds the lease of a workdir inside; of the processes of one run, the first one does.

    Args:
        at_exit: `Preemption.at_exit`, for a process that leaves inside.

    Raises:
        Held, OSError: see `take`.
    """
    if not runtime.is_first_process():
        yield
        return
    held = take(os.path.expanduser(workdir))
    at_exit(held.release)
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def _writing(workdir: str | os.PathLike) -> Iterator[None]:
    """Names the workdir in any error of writing it; those of buckets have no common type."""
    try:
        yield
    except Held:
        raise
    except Exception as error:
        raise OSError(
            f"workdir = {str(workdir)!r} cannot be written ({error}); give another --config.workdir"
        ) from error


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Inside, no other process of this disk looks at the lease."""
    if is_remote(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
