"""How time and memory grow with batch, photos, class images, resolution and checkpoints, on the embedded base.

    python benchmarks/growth.py
    python benchmarks/growth.py --only batch photos

Every row is a process of its own. "Against the first" compares a row with the first of its kind: the ratio of their
seconds over the ratio of their work. Above 1, time grows faster than work. Reading data includes compiling the encoder.
"""

import argparse
import multiprocessing
import resource
import runpy
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.job import lower_steps
from dreambooth_jax.runs.setup import begin, prepare_data, set_up, start_state

ROOT = Path(__file__).parent.parent
STEPS = 20
LORA = {"method": "lora", "train_text_encoder": False}


class Row(NamedTuple):
    """What is measured of one run.

    Attributes:
        fields: of the config.
        photos, class_images: pictures that are written for it; 0 for the shipped photos, and for no prior.
        checkpoints: that lie in the workdir before one more is saved and read.
        work: what seconds are set against.
        seconds: name of the measure that should grow with the work, see `measure`.
    """

    fields: Mapping[str, Any]
    work: float
    seconds: str
    photos: int = 0
    class_images: int = 0
    checkpoints: int = 0


def _batches(fields: Mapping[str, Any]) -> dict[str, Row]:
    return {str(n): Row({"batch_size": n, **fields}, n, "step") for n in (1, 2, 4, 8, 16, 32, 64)}


FACTORS: dict[str, dict[str, Row]] = {
    "batch, full": _batches({}),
    "batch, lora": _batches(LORA),
    "photos": {str(n): Row({}, n, "data", photos=n) for n in (50, 500, 5000)},
    "photos, a step": {str(n): Row({}, 1, "step", photos=n) for n in (50, 500, 5000)},
    "class images, new": {str(n): Row({}, n, "data", class_images=n) for n in (100, 1000, 10_000)},
    "class images, kept": {str(n): Row({}, n, "again", class_images=n) for n in (100, 1000, 10_000)},
    "resolution": {str(n): Row({"resolution": n, "batch_size": 1}, n**2, "step") for n in (64, 128, 192, 256)},
    "checkpoints, a save": {str(n): Row(LORA, 1, "save", checkpoints=n) for n in (1, 10, 100)},
    "checkpoints, a start": {str(n): Row(LORA, 1, "restore", checkpoints=n) for n in (1, 10, 100)},
}


def write_pictures(folder: Path, count: int) -> None:
    """Smooth pictures of 64 pixels a side, no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.png")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call."""
    started = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - started, result


def config_of(row: Row, folder: Path) -> ConfigDict:
    """The config of a row, whose pictures are written."""
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
    config.instance_images = str(ROOT / config.instance_images)
    config.workdir, config.prior_preservation = str(folder / "run"), row.class_images > 0
    config.update(row.fields)
    if row.photos:
        write_pictures(folder / "photos", row.photos)
        config.instance_images = str(folder / "photos")
    if row.class_images:
        write_pictures(folder / "class", row.class_images)
        config.class_images, config.num_class_images = str(folder / "class"), row.class_images
    if row.checkpoints:
        config.keep_every = 1
    return config


def measure(row: Row, folder: Path) -> dict[str, float]:
    """Seconds: "data", to read and encode all examples; "again", the same with encoded class images kept; "step", a
    step of training; "save" and "restore", a checkpoint written and read beside others. "peak": GiB of the process."""
    runtime.start()
    config = config_of(row, folder)
    started = time.perf_counter()
    run = set_up(config)
    prepared = time.perf_counter() - started
    trainable, frozen, key = begin(run.job, read_params(run.pipeline, run.mesh))
    params = run.job.method.combine(frozen, trainable)
    seconds, (data,) = timed(lambda: prepare_data(run, params))
    found = {"data": prepared + seconds, "again": timed(lambda: (set_up(config), prepare_data(run, params)))[0]}
    manager = checkpoint.open_checkpoints(Path(config.workdir) / "checkpoints", keep_every=config.keep_every or None)
    state = start_state(run.job, trainable, manager)
    steps = lower_steps(run.job, state, frozen, data, key).compile()
    state, _ = steps(state, frozen, data, key, jnp.asarray(2))
    count = min(STEPS, config.steps_per_call)

    def rounds(state: TrainState) -> TrainState:
        for _ in range(STEPS // count):
            state, _ = steps(state, frozen, data, key, jnp.asarray(count))
        return state

    seconds, state = timed(lambda: rounds(state))
    found["step"] = seconds / STEPS
    if row.checkpoints:
        found |= of_checkpoints(config, state, manager, row.checkpoints)
    manager.close()
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def of_checkpoints(config: ConfigDict, state: TrainState, manager: Any, count: int) -> dict[str, float]:
    """Seconds to save a checkpoint beside `count` others, and to start from it."""

    def save(step: int) -> None:
        checkpoint.save(manager, step, state)
        checkpoint.wait(manager)

    for step in range(1, count + 1):
        save(step)
    saving = timed(lambda: save(count + 1))[0]

    def start() -> TrainState | None:
        set_up(config)
        opened = checkpoint.open_checkpoints(Path(config.workdir) / "checkpoints", keep_every=config.keep_every)
        restored = checkpoint.restore(opened, state)
        opened.close()
        return restored

    return {"save": saving, "restore": timed(start)[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="the factors whose names begin so (default: all)")
    options = parser.parse_args()
    new_process = multiprocessing.get_context("spawn")
    known: dict[str, dict[str, float]] = {}
    print("| what | value | seconds | against the first | peak GiB |\n|---|---|---|---|---|", flush=True)
    for factor, rows in FACTORS.items():
        if not factor.startswith(tuple(options.only)):
            continue
        first = None
        for value, row in rows.items():
            measured = repr(row._replace(work=1, seconds=""))
            if measured not in known:
                with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=new_process) as pool:
                    known[measured] = pool.submit(measure, row, Path(folder)).result()
            found = known[measured]
            first = first or (found[row.seconds], row.work)
            growth = found[row.seconds] / first[0] / (row.work / first[1])
            print(f"| {factor} | {value} | {found[row.seconds]:.3f} | {growth:.2f} | {found['peak']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
