"""The training methods side by side on the embedded base: time, memory, size of the file, scores, pictures.

    python benchmarks/methods.py                # half an hour on two cores; goes on where it was stopped
    python benchmarks/methods.py --plan         # the same methods on Stable Diffusion 1.5, by the TPU compiler

Every method trains `configs/dog.py:tiny,METHOD` in a process of its own, with class images that were painted before.
The table is docs/methods.md's, the sheet docs/methods.png. Results are kept as one JSON line per method.
"""

import argparse
import itertools
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from kept import kept

ROOT = Path(__file__).parent.parent
METHODS = ("full", "lora", "dora", "inversion", "pivotal")
SCORES = ("DINO", "CLIP-T", "PRES")
SETTINGS = ("in the snow", "on the beach", "on a red background")
GIB = 2**30


def train_one(arguments: list[str]) -> dict:
    """Trains in this process: seconds of all; seconds of a step between two looks of the host, by the clock and summed
    over all cores; peak memory in bytes."""
    from dreambooth_jax import train
    from dreambooth_jax.runs.report import Reporter

    record, seen, started = Reporter.record, [], time.monotonic()

    def timed(self, first_step, metrics, count):
        record(self, first_step, metrics, count)  # waits for the call
        seen.append(np.array([first_step + count, time.monotonic(), time.process_time()]))

    Reporter.record = timed
    train.main(arguments)
    calls = [b - a for a, b in itertools.pairwise(seen)]
    return {
        "seconds": time.monotonic() - started,
        "step": statistics.median(seconds / steps for steps, seconds, _ in calls),
        "core": statistics.median(seconds / steps for steps, _, seconds in calls),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measured(method: str, folder: Path, steps: int) -> dict:
    """Trains, exports and scores a method; everything lies in `folder`."""
    from dreambooth_jax import evaluate
    from dreambooth_jax.runs.exports import export

    workdir = folder / method
    preset = "tiny" if method == "full" else f"tiny,{method}"
    arguments = [
        *("--config", f"{ROOT}/configs/dog.py:{preset}", f"--config.workdir={workdir}", f"--config.steps={steps}"),
        *(f"--config.save_every={steps}", f"--config.sample_every={steps}"),
        *([f"--config.class_images={folder / 'class_images'}"] if method != "inversion" else []),
    ]
    child = [sys.executable, __file__, "--train", *arguments]
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    output = folder / f"{method}.safetensors"
    said = export(workdir, output, step=None, kind=None, dtype="float16", rank=0)
    files = [path for path in (output, output.with_name(f"{method}_token.safetensors")) if path.exists()]
    evaluate.main(["--workdir", str(workdir), "--count", "4", "--class_count", "16"])
    (scores,) = json.loads((workdir / "evaluation" / "table.json").read_text())["rows"]
    values = {name: _mean(scores["values"][name]) for name in SCORES}
    return row | values | {"size": sum(path.stat().st_size for path in files), "says": said}


def _mean(value) -> float:
    return value["mean"] if isinstance(value, dict) else value


def paint(folder: Path, methods: list[str]) -> Path:
    """A sheet: photos, then a row of pictures per method, with the same noise in every row."""
    from PIL import Image

    from dreambooth_jax.data.images import decode_image
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.painting.painter import batch_for
    from dreambooth_jax.painting.sheets import contact_sheet, paint_rows
    from dreambooth_jax.runs.job import painter_of
    from dreambooth_jax.runs.workdir import open_run

    mesh, rows = make_mesh(), []
    for method in methods:
        config, pipeline, params = open_run(folder / method, mesh)
        prompts = [f"a {config.identifier} {config.class_noun} {place}" for place in SETTINGS]
        prompts.append(f"a {config.class_noun}")
        painter = painter_of(config, pipeline, mesh, batch_size=batch_for([2 * len(prompts)], 8, mesh.size))
        rows.append([picture for row in paint_rows(painter, params, prompts, (0, 1)) for picture in row])
    photos = sorted((ROOT / "examples" / "subjects" / "dog").glob("*.jpg"))[: len(rows[0])]
    side = rows[0][0].shape[0]
    small = [decode_image(path.read_bytes()).resize((side, side), Image.Resampling.LANCZOS) for path in photos]
    sheet = contact_sheet([list(map(np.asarray, small)), *rows], ["photos", *methods])
    path = folder / "methods.png"
    Image.fromarray(sheet).quantize(128, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
    return path


def planned(method: str) -> dict:
    """The TPU compiler's figures of a method on Stable Diffusion 1.5."""
    from dreambooth_jax.runs.slices import plan

    get_config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]
    config = get_config("sd15" if method == "full" else f"sd15,{method}")
    found = plan(config, "v5e:1x1", class_images=False)
    size = found.optimizer_state / 8  # two float32 moments per trained parameter
    return {"peak": found.cost.peak, "roofline": found.cost.roofline_seconds, "trained": size}


def line(method: str, row: dict) -> str:
    """A row of the table."""
    own = f"{1e3 * row['step']:.0f} | {1e3 * row['core']:.0f} | {row['seconds'] / 60:.1f} | {row['memory'] / GIB:.2f}"
    own = f"{own} | {_size(row['size'])}"
    return f"| `{method}` | {own} | {' | '.join(f'{row[name]:.3f}' for name in SCORES)} |"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="some rows, and no sheet")
    parser.add_argument("--plan", action="store_true", help="the TPU compiler's figures instead")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    from dreambooth_jax.devices import runtime

    if options.train:
        print(json.dumps(train_one(options.train)))
        return
    runtime.start()
    if options.plan:
        print("| method | trained, M | peak GiB | roofline ms |\n|---|---|---|---|")
        for method in options.only:
            row = kept(options.folder / "plans.jsonl", method, lambda method=method: planned(method))
            ms, peak = 1e3 * row["roofline"], row["peak"] / GIB
            print(f"| `{method}` | {row['trained'] / 1e6:.3g} | {peak:.2f} | {ms:.0f} |", flush=True)
        return
    (options.folder / "class_images").mkdir(parents=True, exist_ok=True)
    paint_class_images(options.folder)
    print(f"| method | step, ms | of all cores | run, minutes | memory, GiB | file | {' | '.join(SCORES)} |")
    print(f"|---{'|---' * (5 + len(SCORES))}|")
    for method in options.only:
        make = lambda method=method: measured(method, options.folder.resolve(), options.steps)  # noqa: E731
        print(line(method, kept(options.folder / f"results_{options.steps}.jsonl", method, make)), flush=True)
    if options.only == METHODS:
        print(f"\npictures: {paint(options.folder, list(METHODS))}")


def paint_class_images(folder: Path) -> None:
    """Paints what the shared folder of class images lacks."""
    from dreambooth_jax.families.pipeline import read_params
    from dreambooth_jax.runs.setup import prepare_data, set_up

    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
    config.update(workdir=str(folder / "class"), instance_images=str(ROOT / config.instance_images))
    config.update(class_images=str(folder / "class_images"), create_class_images=True)
    run = set_up(config)
    if run.to_paint:
        prepare_data(run, read_params(run.pipeline, run.mesh))


if __name__ == "__main__":
    main()
