"""Stands in for `gcloud` on PATH: a slice has one folder per host in $FAKE_CLOUD, and its hosts' commands are processes
of this machine. A file `preempt` there takes the slice away once, as Google does: SIGTERM, then gone. With a file
`full` there are no slices left; with `once` there is one, which is taken away before it is used.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
HOSTS = [CLOUD / f"host{number}" for number in range(2)]
STATE = CLOUD / "state"


def create() -> int:
    if STATE.exists() or (CLOUD / "full").exists():
        return 1
    once = CLOUD / "once"
    for host in HOSTS:
        host.mkdir(parents=True)
    STATE.write_text("SUSPENDED" if once.exists() else "ACTIVE")
    if once.exists():
        once.rename(CLOUD / "full")
    return 0


def delete() -> int:
    assert STATE.exists(), "no slice of that name"
    for path in HOSTS:
        shutil.rmtree(path)
    STATE.unlink()
    return 0


def ssh(command: str) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number, host in enumerate(HOSTS):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        environment = os.environ | cluster | {"HOME": str(host)}
        processes.append(subprocess.Popen(["bash", "-c", command], cwd=host, env=environment, start_new_session=True))
    while any(process.poll() is None for process in processes):
        if (CLOUD / "preempt").exists():
            (CLOUD / "preempt").unlink()
            STATE.write_text("SUSPENDED")
            for process in processes:
                os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    return 255 if any(process.returncode for process in processes) else 0


def scp(source: str, target: str) -> int:
    for host in HOSTS:
        shutil.copy(source, host / target.partition(":")[2])
    return 0


def rsync(options: dict[str, str], source: str, target: str) -> int:
    for path in Path(source).rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and not re.fullmatch(options["--exclude"], str(path)):
            (Path(target) / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(target) / relative)
    return 0


def main(arguments: list[str]) -> int:
    with (CLOUD / "calls").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("-")]
    options = dict(word.partition("=")[::2] for word in arguments if word.startswith("--"))
    match words:
        case ["compute", "tpus", "tpu-vm" | "queued-resources", "create", _]:
            return create()
        case ["compute", "tpus", "tpu-vm" | "queued-resources", "delete", _]:
            return delete()
        case ["compute", "tpus", "tpu-vm" | "queued-resources", "describe", _]:
            return (print(STATE.read_text()) or 0) if STATE.exists() else 1
        case ["compute", "tpus", "tpu-vm", "ssh", _]:
            return ssh(options["--command"])
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            return scp(source, target)
        case ["storage", "rsync", source, target]:
            return rsync(options, source, target)
    raise SystemExit(f"gcloud: not known: {arguments}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
