"""Stable Diffusion 1.5 on one TPU chip, as its compiler sees it: the training step with its settings, and sampling.
And the training steps of other models on their slices.

    pip install -e ".[plan]" && python benchmarks/tpu_step.py          # a quarter of an hour; --full: hours
    python benchmarks/tpu_step.py --full --only "v5e, (1+1)"           # some rows

512 pixels, bfloat16, AdamW in float32, prior preservation: (1+1) is one subject image and one class image. Every row is
the program that `train` would run, compiled from shapes; IF's prompts are encoded before it. Rows are kept in runs/,
and the programs as HLO text beside them, for cycles.py; a stopped run goes on.
"""

import argparse
import gzip
import runpy
from pathlib import Path

from kept import kept

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS, chip_of
from dreambooth_jax.devices.tpu import Cost, OutOfMemory, compile_for
from dreambooth_jax.runs.job import argument_shapes, lower_steps, training_size
from dreambooth_jax.runs.slices import Plan, described, job_on, painting_cost, plan
from dreambooth_jax.runs.stages import stage_configs

ROOT = Path(__file__).parent.parent
GIB = 2**30
# chip, images of the subject and of the class, what differs from configs/dog.py:sd15
TEXT, NO_CLIPPING, MOMENT = {"train_text_encoder": True}, {"clip_norm": 0.0}, {"moment_dtype": "bfloat16"}
ELEMENTWISE, LAYERS = {"remat": "elementwise"}, {"remat": "layers"}
SECOND = {"second_moment_dtype": "bfloat16"}
EIGHT, MUON = {"moment_dtype": "int8", "second_moment_dtype": "int8"}, {"optimizer": "muon"}
LORA, INT8 = TEXT | {"method": "lora"}, {"frozen_dtype": "int8"}
SETTINGS = [
    (chip, images, fields)
    for chip, images, choices in (
        ("v5e", 1, ({}, ELEMENTWISE, LAYERS, LAYERS | NO_CLIPPING, MOMENT, MOMENT | SECOND, EIGHT, MUON)),
        ("v5e", 1, (ELEMENTWISE | MOMENT | SECOND,)),
        ("v5e", 1, (TEXT, TEXT | ELEMENTWISE)),
        ("v5e", 1, (LORA, LORA | ELEMENTWISE, LORA | LAYERS, LORA | ELEMENTWISE | INT8)),
        ("v6e", 4, ({}, ELEMENTWISE, LAYERS, TEXT | ELEMENTWISE)),
        ("v5e", 4, (LAYERS | MOMENT,)),
    )
    for fields in choices
]
DDIM = {"sampler": "ddim", "sampling_steps": 50}
SAMPLERS = [(chip, 4, DDIM) for chip in ("v5e", "v6e")]
SAMPLERS += [("v5e", 4, DDIM | {"reuse_features": n}) for n in (3, 5)]
UPSCALER = {
    "base": "stabilityai/stable-diffusion-x4-upscaler",
    "train_text_encoder": False,
    "sr_crop": 256,
    "resolution": 1024,
}
BATCH = {"resolution": 512, "batch_size": 32, "train_text_encoder": False, "remat": "nothing"}
# model, preset of configs/dog.py, stage, slice, what differs from the preset
OTHERS = [
    ("Stable Diffusion 2.1", "sd21", 1, "v5p:1x1x1", BATCH),
    ("IF-I-M", "if", 1, "v5e:1x1", ELEMENTWISE),
    ("IF-I-M", "if", 1, "v5e:1x1", {"remat": "nothing"}),
    ("IF-I-XL", "if_xl,lora", 1, "v5e:1x1", ELEMENTWISE),
    ("IF-I-XL", "if_xl", 1, "v5e:2x4", LAYERS | {"batch_size": 8, "mesh_fsdp": 8}),
    ("IF-II-L", "if_xl", 2, "v5e:2x2", LAYERS | {"batch_size": 4, "mesh_fsdp": 4}),
    ("x4", "sd15", 1, "v5e:1x1", UPSCALER),
]


def title(chip: str, images: int, fields: dict) -> str:
    """Of a row."""
    changed = [name if value is True else f"{name}={value}" for name, value in fields.items()]
    return f"{chip}, ({images}+{images})" + "".join(f", {text}" for text in changed)


def row(found: Plan, hlo: Path) -> dict:
    """What is kept of a plan."""
    return {"missing": found.missing} if found.cost is None else figures(found.cost, hlo)


def figures(cost: Cost, hlo: Path) -> dict:
    """What is kept of a compile; the program goes to the file `hlo`."""
    hlo.parent.mkdir(parents=True, exist_ok=True)
    hlo.write_bytes(gzip.compress(cost.hlo.encode()))
    return {
        "held": cost.arguments,
        "temporaries": cost.temporaries,
        "peak": cost.peak,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "roofline": cost.roofline_seconds,
        "kernels": cost.kernel_seconds,
        "cycles": cost.cycle_seconds,
        "compile": cost.compile_seconds,
    }


def training(config, topology: str, hlo: Path, *, quick: bool) -> dict:
    """What is kept of a training step alone, on five photos."""
    job = job_on(config, described(config), topology)
    size = training_size(job.config)
    lowered = lower_steps(job, *argument_shapes(job, 5, size), size)
    try:
        return figures(compile_for(chip_of(topology), lowered, quick=quick), hlo)
    except OutOfMemory as error:
        return {"missing": error.missing}


def painting(config, chip: str, hlo: Path, *, quick: bool) -> dict:
    """What is kept of a batch of pictures; its time is that of all sampling steps."""
    cost, seconds = painting_cost(job_on(config, described(config), f"{chip}:1x1"), CHIPS[chip], quick=quick)
    passes = -(-config.sampling_steps // config.reuse_features)
    return figures(cost, hlo) | {"roofline": seconds, "kernels": cost.kernel_seconds * passes, "cycles": None}


def line(entry: dict) -> str:
    """A row of the table."""
    if "missing" in entry:
        return f"| {entry['name']} | | | does not fit, {entry['missing'] / GIB:.2f} GiB too much | | | | |"
    cycles = "" if entry["cycles"] is None else f"{entry['cycles'] * 1e3:.0f}"
    sizes = (f"{entry[what] / GIB:.2f}" for what in ("held", "temporaries", "peak"))
    times = f"{entry['roofline'] * 1e3:.0f} | {entry['kernels'] * 1e3:.0f} | {cycles} | {entry['compile']:.0f}"
    return f"| {entry['name']} | {' | '.join(sizes)} | {times} |"


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="with the effort of the TPU's own compile")
    parser.add_argument("--only", nargs="+", default=[], help="names of rows")
    options = parser.parse_args()
    log = Path("runs") / f"tpu_step{'_full' if options.full else ''}.jsonl"
    get_config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]

    def show(name: str, make) -> None:
        if not options.only or name in options.only:
            hlo = log.with_suffix("") / f"{name}.txt.gz"
            print(line(kept(log, name, lambda: make(hlo))), flush=True)

    print(
        "| Stable Diffusion 1.5 | held GiB | temporaries GiB | peak GiB | roofline ms | of it kernels | cycles ms | "
        "compiled in s |\n|" + "---|" * 8
    )
    for chip, images, fields in SETTINGS:
        config = get_config("sd15")
        config.update(batch_size=images, train_text_encoder=False, remat="nothing")
        config.update(fields)
        show(
            title(chip, images, fields),
            lambda hlo, config=config, chip=chip: row(
                plan(config, f"{chip}:1x1", class_images=False, quick=not options.full), hlo
            ),
        )
    for chip, images, fields in SAMPLERS:
        config = get_config("sd15")
        config.update(class_batch_size=images, sample_count=images, **fields)  # sheets that fill their batches
        reuse = f", whole UNet every {fields['reuse_features']}" if "reuse_features" in fields else ""
        show(
            f"{chip}, painting {images}, {fields['sampling_steps']} steps of {fields['sampler']}{reuse}",
            lambda hlo, config=config, chip=chip: painting(config, chip, hlo, quick=not options.full),
        )
    for model, preset, stage, topology, fields in OTHERS:
        config = stage_configs(get_config(preset))[stage - 1]
        config.update(fields)
        show(
            f"{model} ({preset}), {topology}, ({config.batch_size}+{config.batch_size}), remat={config.remat}",
            lambda hlo, config=config, topology=topology: training(config, topology, hlo, quick=not options.full),
        )


if __name__ == "__main__":
    main()
