"""A training run killed again and again ends where the uninterrupted one ends, bit for bit.

    python benchmarks/kills.py                 # 200 SIGKILLs in five chains; about an hour on two cores
    python benchmarks/kills.py --kills 20 --chains 2

Every chain trains the micro base of the tests. A kill comes at a random moment after a random event: a start, class
images being painted, a checkpoint being written, committed or deleted, a sheet being painted.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.runs import assert_same_run, checkpoints, finish, kill_when, pictures, start, write_micro


def event_of(kind: str, workdir: Path):
    """Whether what `kind` names has happened since now."""
    saved, painted = checkpoints(workdir), len(pictures(workdir / "class_images"))
    sheets = len(pictures(workdir / "samples"))
    began = time.monotonic()
    return {
        "start": lambda: time.monotonic() - began > 1,
        "class images": lambda: len(pictures(workdir / "class_images")) > painted or painted >= 10,
        "writing": lambda: any("orbax-checkpoint-tmp" in p.name for p in (workdir / "checkpoints").glob("*")),
        "saved": lambda: checkpoints(workdir) != saved,
        "sheet": lambda: len(pictures(workdir / "samples")) > sheets,
    }[kind]


def chain(number: int, kills: int, base: Path, whole: Path, folder: Path) -> list[tuple[str, int]]:
    """Kills one run `kills` times, then lets it end and compares; returns (event, newest step) of every kill."""
    moments, workdir, log = random.Random(number), folder / f"chain_{number}", []
    while len(log) < kills:
        kind = moments.choice(["start", "class images", "writing", "saved", "sheet"])
        process = start(workdir, base=str(base), keep_last=2)
        if kill_when(process, event_of(kind, workdir), moments.uniform(0, 0.5)):
            log.append((kind, max(checkpoints(workdir), default=0)))
            print(f"chain {number}, kill {len(log)}: {kind}, step {log[-1][1]}", flush=True)
        elif checkpoints(workdir)[-1:] == [60]:  # it had ended: begin a new one
            assert_same_run(workdir, whole)
            shutil.rmtree(workdir)
    finish(workdir, base=str(base), keep_last=2)
    assert_same_run(workdir, whole)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs over all chains (default: 200)")
    parser.add_argument("--chains", type=int, default=5, help="runs (default: 5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_micro(folder / "base")
        finish(folder / "whole", base=str(folder / "base"), keep_last=2)
        print("| chain | kills | at which steps | ends bit-identical |\n|---|---|---|---|")
        for number in range(options.chains):
            log = chain(number, options.kills // options.chains, folder / "base", folder / "whole", folder)
            print(f"| {number} | {len(log)} | {', '.join(str(step) for _, step in log)} | yes |", flush=True)


if __name__ == "__main__":
    main()
