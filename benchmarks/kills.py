"""A training run killed again and again ends where the uninterrupted one ends, bit for bit.

    python benchmarks/kills.py                          # 200 SIGKILLs in five chains
    python benchmarks/kills.py --kills 20 --chains 2
    python benchmarks/kills.py --folder runs/kills      # kept; the same command goes on where it was stopped

Every chain trains a LoRA of the tests' micro base, whose steps take milliseconds, and saves or paints every few steps.
A moment is random: any time of the process's life, or soon after a picture, a checkpoint or a sheet. The signal is
SIGKILL; in every second chain one in four is SIGTERM, SIGINT or SIGHUP in turn instead, and the run must then leave by
itself, with the code of the signal. A chain that reaches the end is compared, and begins anew.

A run is the train command in a process of its own, forked from one that has only imported the library: a process that
is killed while it imports has touched nothing, and to import costs as much as the rest.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.runs import ROOT, SMALL, assert_same_run, checkpoints, flags, log_of, pictures, write_micro

from dreambooth_jax import train

FIELDS = {
    "method": "lora",
    "lora_rank": 2,
    "train_text_encoder": False,
    "num_class_images": 6,
    "class_batch_size": 2,
    "steps": 12,
    "save_every": 2,
    "sample_every": 4,
    "keep_last": 2,
}
MOMENTS = ("any moment", "any moment", "class image", "writing", "saved", "sheet")
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["__main__", "dreambooth_jax.runs.training", "dreambooth_jax.runs.many"])
Process = multiprocessing.process.BaseProcess


def command(workdir: Path, base: Path) -> None:
    """The train command in this process; its output goes to the run's log."""
    for number in ASKED:  # as a shell starts it
        signal.signal(number, signal.SIG_DFL)
    log = os.open(log_of(workdir), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    train.main(["--config", "configs/dog.py", *flags(**SMALL | FIELDS | {"workdir": str(workdir), "base": str(base)})])


def start(workdir: Path, base: Path) -> Process:
    process = FORKING.Process(target=command, args=(workdir, base))
    process.start()
    return process


def finish(workdir: Path, base: Path) -> None:
    process = start(workdir, base)
    process.join()
    assert process.exitcode == 0, log_of(workdir).read_text()


def event_of(kind: str, workdir: Path, seconds: float) -> Callable[[], bool]:
    """Whether what `kind` names has happened since now; any moment lies within `seconds`."""
    began, saved = time.monotonic(), checkpoints(workdir)
    painted, sheets = (len(pictures(workdir / name)) for name in ("class_images", "samples"))
    return {
        "any moment": lambda: time.monotonic() - began > seconds,
        "class image": lambda: len(pictures(workdir / "class_images")) > painted or painted >= 6,
        "writing": lambda: any("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*")),
        "saved": lambda: checkpoints(workdir) != saved,
        "sheet": lambda: len(pictures(workdir / "samples")) > sheets,
    }[kind]


def send_when(
    process: Process, number: signal.Signals, happened: Callable[[], bool], delay: float
) -> tuple[bool, float]:
    """Sends a signal `delay` seconds after `happened()`; (whether the process was running, seconds until its end)."""
    while not happened() and process.is_alive():
        time.sleep(0.005)
    time.sleep(delay)
    if was_running := process.is_alive():
        os.kill(process.pid, number)
    sent = time.monotonic()
    process.join(300)
    return was_running, time.monotonic() - sent


def ends_well(code: int, number: signal.Signals, log: str) -> bool:
    """Whether a process may end so after a signal: by itself, or by the signal before the command began. There the
    server of forks ends a child with 1 on SIGINT."""
    left = number in ASKED and code == 128 + number and "Traceback" not in log
    return left or code in (0, -number) or (number == signal.SIGINT and code == 1 and not log)


def same(workdir: Path, whole: Path) -> None:
    """All that a run leaves is equal, and nothing unfinished lies in its folder."""
    assert_same_run(workdir, whole)
    assert pictures(workdir / "samples" / "before") == pictures(whole / "samples" / "before")
    assert not [path for path in workdir.rglob("*") if path.name.endswith(".partial") or "checkpoint-tmp" in path.name]


def chain(number: int, kills: int, base: Path, whole: Path, seconds: float) -> dict:
    """Kills one run `kills` times, lets it end and compares; what was done so far is in chain_N.json.

    Args:
        seconds: of the whole run without a kill.
    """
    workdir = whole.with_name(f"chain_{number}")
    file = workdir.with_suffix(".json")
    done = json.loads(file.read_text()) if file.exists() else {"kills": [], "asked": [], "ended": 0, "slowest": 0.0}
    while len(done["kills"]) < kills:
        random_ = random.Random(f"{number} {len(done['kills'])} {len(done['asked'])} {done['ended']}")
        kind, delay = random_.choice(MOMENTS), random_.uniform(0, 0.3)
        asked = number % 2 == 1 and random_.random() < 0.25
        name = ASKED[len(done["asked"]) % len(ASKED)] if asked else signal.SIGKILL
        log_of(workdir).touch()  # a process that is killed at once writes none
        before = len(log_of(workdir).read_text())
        process = start(workdir, base)
        try:
            was_running, took = send_when(process, name, event_of(kind, workdir, random_.uniform(0, seconds)), delay)
        finally:
            process.kill()
        log = log_of(workdir).read_text()[before:]
        assert ends_well(process.exitcode, name, log), f"{kind}, {name.name}: code {process.exitcode}\n{log}"
        if process.exitcode == 0:
            same(workdir, whole)
            shutil.rmtree(workdir)
            done["ended"] += 1
        elif was_running:
            done["asked" if asked else "kills"].append((kind, name.name, max(checkpoints(workdir), default=0)))
            done["slowest"] = max(done["slowest"], took)
            print(f"chain {number}, {len(done['kills'])} kills: {done['asked' if asked else 'kills'][-1]}", flush=True)
        file.write_text(json.dumps(done))
    finish(workdir, base)
    same(workdir, whole)
    return done


def row(number: int, done: dict) -> str:
    """A line of the table."""
    moments = collections.Counter(kind for kind, *_ in done["kills"])
    signals = collections.Counter(name for _, name, _ in done["asked"])
    words = (", ".join(f"{name} {count}" for name, count in sorted(counter.items())) for counter in (moments, signals))
    steps = len({step for *_, step in done["kills"]})
    return f"| {number} | {len(done['kills'])} | {' | '.join(words)} | {steps} | {done['ended'] + 1} | yes |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs over all chains (default: 200)")
    parser.add_argument("--chains", type=int, default=5, help="runs (default: 5)")
    parser.add_argument("--folder", type=Path, help="folder of all runs, kept (default: a temporary one)")
    options = parser.parse_args()
    folder = options.folder.absolute() if options.folder else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    base, whole = folder / "base", folder / "whole"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if not (folder / "made").exists():
        write_micro(base)
        finish(whole, base)
        (folder / "made").touch()
    shutil.rmtree(folder / "again", ignore_errors=True)
    began = time.monotonic()  # at every start, as the cores may be less busy now; compiled programs are found
    finish(folder / "again", base)
    same(folder / "again", whole)
    seconds = time.monotonic() - began
    print(f"the run alone: {seconds:.1f} s")
    rows = [
        row(number, chain(number, options.kills // options.chains, base, whole, seconds))
        for number in range(options.chains)
    ]
    print("| chain | SIGKILLs | moments | other signals | different steps | times at the end | bit-identical |")
    print("|---" * 7 + "|", *rows, sep="\n")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
