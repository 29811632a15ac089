"""Many subjects in one program against as many runs, on the embedded base: wall time from a cold start, and warm steps.

    python benchmarks/many.py                                # 16 subjects of one noun, 300 steps each
    python benchmarks/many.py --parts warm                   # the steps alone
    python benchmarks/many.py --subjects 2 --steps 4 --alone 1 --counts 1 2 --seconds 1

Subjects are the example subjects' photos, again and again, all called "dog". Every run is the command, in a new process
with a new cache of compiled programs: process start, class images, compiling and files are in its time.

* together: one run of configs/many.py.
* alone: one subject of it, cold; and others with the programs in the cache, painting class images of their own, as the
  command does by itself, or with those of the first run (`class_images`). The time of all subjects alone is that of the
  cold run and of so many others, of which `--alone` are measured; the rest are taken as their mean.

Warm: calls of 10 steps with every program compiled, for one subject (the program of a run alone) and for several.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dreambooth_jax.adapters.many import stack
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.job import Job, argument_shapes, held, initial, lower_steps, make_job, open_base, read_shapes
from dreambooth_jax.runs.lanes import lower_many, many_shapes
from dreambooth_jax.runs.setup import begin

ROOT = Path(__file__).parent.parent
PHOTOS, STEPS = 5, 10  # of a subject; of a call
Advance = Callable[[TrainState, Array], tuple[TrainState, Metrics]]


def copied_subjects(folder: Path, count: int) -> list[Path]:
    """Folders of photos: the example subjects, again and again."""
    found = sorted(path for path in (ROOT / "examples" / "subjects").iterdir() if path.is_dir())
    copies = [folder / f"subject_{number:02d}" for number in range(count)]
    for number, copy in enumerate(copies):
        shutil.copytree(found[number % len(found)], copy)
    return copies


def waited(cache: Path, **fields: object) -> float:
    """Seconds of one command in a process of its own."""
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "dreambooth_jax.train", "--config", "configs/many.py", *flags]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, check=True)
    return time.monotonic() - began


def cold(folder: Path, count: int, steps: int, alone: int) -> dict[str, float]:
    """Wall seconds: of all together, of one alone cold, of one alone with programs in the cache, and of one that has
    class images too (means of `alone` runs)."""
    subjects = copied_subjects(folder / "photos", count)
    seconds = {"together": waited(folder / "xla", subjects=folder / "photos", workdir=folder / "many", steps=steps)}
    cache, first = folder / "xla_alone", folder / "alone"

    def run(number: int, name: str, **fields: object) -> float:
        own = {"subjects": "", "instance_images": subjects[number % count], "workdir": folder / name, "steps": steps}
        return waited(cache, **own | fields)

    seconds["alone, cold"] = run(0, "alone")
    again = [run(number + 1, f"again_{number}") for number in range(alone)]
    shared = [run(number + 1, f"shared_{number}", class_images=first / "class_images") for number in range(alone)]
    return seconds | {
        "alone, programs in the cache": statistics.mean(again),
        "alone, class images too": statistics.mean(shared),
    }


def table(seconds: dict[str, float], count: int) -> str:
    """Wall seconds of all subjects, and how many times faster they are together."""
    first, together = seconds["alone, cold"], seconds["together"]
    rows = [f"| {count} together | {together:.1f} | |"]
    for name in ("alone, programs in the cache", "alone, class images too"):
        whole = first + (count - 1) * seconds[name]
        sum_ = f"{first:.1f} + {count - 1} x {seconds[name]:.1f}"
        rows.append(f"| {count} {name}: {sum_} | {whole:.1f} | {whole / together:.2f} |")
    return "\n".join(["| runs | wall s | against together |", "|---|---|---|", *rows])


def warm(counts: list[int], seconds: float) -> str:
    """Subject-steps a second for several numbers of subjects."""
    config = config_file.load(str(ROOT / "configs" / "many.py"))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    job = make_job(config, open_base(config, dtype=jnp.dtype(config.dtype), remat=config.remat), mesh)
    start = begin(job, held(job, read_params(job.pipeline, mesh, read_shapes(job))))
    rows = ["| subjects | compiled in s | subject-steps/s | against one |", "|---|---|---|---|"]
    single = None
    for count in counts:
        began = time.monotonic()
        state, advance = program(job, count, *start)
        compiled = time.monotonic() - began
        rate = count * steps_a_second(advance, state, seconds)
        single = single or rate / count
        rows.append(f"| {count} | {compiled:.1f} | {rate:.1f} | {rate / single:.2f} |")
    return "\n".join(rows)


def program(job: Job, count: int, trainable: Params, frozen: Params, key: Array) -> tuple[TrainState, Advance]:
    """A state of `count` subjects and the compiled steps, on data of zeros; of one subject, those of a run alone."""
    if count == 1:
        lower, keys, shapes = lower_steps, key, argument_shapes(job, PHOTOS)[2]
        state = jax.jit(initial(job))(trainable)
    else:
        lower, keys, shapes = lower_many, jnp.stack([key] * count), many_shapes(job, count, PHOTOS)[2]
        state = jax.jit(lambda start: stack([initial(job)(start)] * count))(trainable)
    data = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if count > 1:
        data = data._replace(stops=jnp.full(count, 2**30, jnp.int32))
    run = lower(job, state, frozen, data, keys).compile()
    return state, lambda state, number: run(state, frozen, data, keys, number)


def steps_a_second(advance: Advance, state: TrainState, seconds: float) -> float:
    """Steps a second by the median call of those within `seconds`, three at least, after a first one."""
    number, times, began = jnp.asarray(STEPS, jnp.int32), [], None
    while began is None or len(times) < 3 or time.monotonic() - began < seconds:
        call = time.monotonic()
        state, _ = jax.block_until_ready(advance(state, number))
        if began is not None:
            times.append(time.monotonic() - call)
        began = began or time.monotonic()
    return STEPS / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--alone", type=int, default=2, help="warm runs of one subject that are measured, of each kind")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16], help="subjects of the warm steps")
    parser.add_argument("--seconds", type=float, default=30, help="of warm steps, for each number of subjects")
    options = parser.parse_args()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    with tempfile.TemporaryDirectory() as folder:
        if "cold" in options.parts:
            seconds = cold(Path(folder), options.subjects, options.steps, options.alone)
            print(table(seconds, options.subjects), flush=True)
        if "warm" in options.parts:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla_warm"
            runtime.start()
            print(warm(options.counts, options.seconds))


if __name__ == "__main__":
    main()
