"""What a person waits for: the first picture, and the second subject, on the embedded base.

    python benchmarks/second_subject.py [--steps 300]

Three runs of the command, each a new process, with one cache of compiled programs: the dog, cold; the dog again in
another workdir; the cat with other photos, class images, rate and prior weight. A program counts as compiled if that
took half a second or more and the cache did not have it.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax

from dreambooth_jax import train

RUNS = {
    "the dog, cold": {},
    "the dog again": {},
    "the cat": {
        "instance_images": "examples/subjects/cat",
        "class_noun": "cat",
        "identifier": "ktn",
        "views": 2,
        "flip": True,
        "num_class_images": 90,
        "learning_rate": 1e-4,
        "prior_weight": 0.5,
    },
}


def waited(workdir: Path, fields: dict) -> tuple[Counter, float, float, float]:
    """(events of the cache of programs, seconds to the first picture, seconds of the run, seconds of the CPU)."""
    events = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    begun = time.time()
    flags = [f"--config.{name}={value}" for name, value in (fields | {"workdir": str(workdir)}).items()]
    train.main(["--config", "configs/dog.py", *flags])
    ended, usage = time.time(), resource.getrusage(resource.RUSAGE_SELF)
    first = min(path.stat().st_mtime for path in (workdir / "class_images").glob("*.png"))
    return events, first - begun, ended - begun, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
        new_process = multiprocessing.get_context("spawn")
        for name, fields in RUNS.items():
            with ProcessPoolExecutor(1, mp_context=new_process) as pool:
                run = pool.submit(waited, Path(folder) / name, fields | {"steps": options.steps}).result()
            events, first, whole, cpu = run
            compiled, found = events["cache_misses"], events["cache_hits"]
            rows.append(f"| {name} | {compiled} | {found} | {first:.1f} | {whole:.1f} | {cpu:.0f} |")
    print("| run | programs compiled | found in the cache | first picture s | whole run s | CPU s |\n|" + "---|" * 6)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
