"""SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal): save and leave at once, whatever the main thread is doing.

Python runs signal handlers only between bytecodes of the main thread, so a flag that the training loop polls is not
seen during a compile, while class images are painted, or in an evaluation. Here the signal wakes a thread through a
file descriptor. Outside the training loop that thread saves and exits. Inside it, where the state's buffers belong to
the running call, it sets a flag, and the loop looks at it after every call.

Several processes save at the same step: `Agreement` settles which.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreambooth_jax.devices import runtime

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preemption:
    """Answers signals while used as a context manager in the main thread.

    The exit code is 128 + the signal's number, as a shell reports it. A signal that was ignored when the process
    started stays ignored (nohup ignores SIGHUP).
    """

    def __init__(self) -> None:
        self._finish: Callable[[], None] = lambda: None
        self._release: Callable[[], None] = lambda: None
        self._signal: signal.Signals | None = None
        # Held by the thread that leaves: the main thread then stops here instead of changing what is being saved.
        self._lock = threading.Lock()
        self._deferred = self._in_loop = False

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def before_leaving(self, finish: Callable[[], None]) -> None:
        """Sets what must still reach the disk from now on; outside `in_loop` another thread calls it."""
        with self._lock:
            self._finish = finish

    def at_exit(self, release: Callable[[], None]) -> None:
        """Sets what is given back when the process leaves, after the save or its failure."""
        self._release = release

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # The C-level handler writes the descriptor at once; the Python-level one has nothing left to do.
        answered = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in answered}
        self._old_descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(answered,), daemon=True, name="preemption").start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            signal.set_wakeup_fd(self._old_descriptor)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            self._write.close()

    def _watch(self, answered: Sequence[signal.Signals]) -> None:
        while received := self._read.recv(16):
            if numbers := [number for number in answered if number in received]:
                with self._lock:
                    self._signal = self._signal or numbers[0]
                    if not (self._deferred or self._in_loop):
                        self.leave()

    @contextlib.contextmanager
    def in_loop(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; the body looks at it after every call, and calls `leave`.

        A signal that comes after the body's last look is answered at its end, unless it is deferred.
        """
        with self._lock:
            self._in_loop = True
        try:
            yield
        finally:
            with self._lock:
                self._in_loop = False
                self._leave_if_requested()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, only `leave` ends the process: for several processes, which must leave after the same call."""
        with self._lock:
            self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False
                self._leave_if_requested()

    def _leave_if_requested(self) -> None:
        """At the end of a body; an error in it goes before a signal."""
        if self.requested and not self._deferred and sys.exception() is None:
            self.leave()

    def leave(self) -> NoReturn:
        """Saves and ends the process with 128 + the signal, or 1 if that fails, without unwinding the main thread."""
        number = self._signal or signal.SIGTERM  # another process was asked
        code = 128 + number
        try:
            self._finish()
            text = f"leaving with exit code {code}; the same command goes on from here"
        except BaseException as error:
            code, text = 1, f"not saved: {error}. The same command goes on from the checkpoint before"
        self._release()
        if not runtime.is_alone() and runtime.is_first_process():
            time.sleep(1)  # the others end with an error of their own when the coordinator is gone before them
        with contextlib.suppress(OSError, ValueError):  # nobody reads our output any more
            print(f"\n{number.name}: {text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Agreement:
    """Lets all processes stop after the same call without a blocking collective.

    Each call starts an any() over the requests of all processes; its result is read after the next call.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._earlier: jax.Array | None = None

    def __call__(self, requested: bool) -> bool:
        """Whether to leave now; a single process leaves when it is asked."""
        if runtime.is_alone():
            return requested
        flags = jax.make_array_from_callback(self._shape, self._flags, lambda index: np.full(1, requested))
        earlier, self._earlier = self._earlier, self._any(flags)
        return earlier is not None and bool(earlier)
