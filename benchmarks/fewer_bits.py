"""What fewer bits do to the loss: of the frozen base under a LoRA, and of the optimizer's moments.

    python benchmarks/fewer_bits.py frozen      # a quarter of an hour on two cores; goes on where it was stopped
    python benchmarks/fewer_bits.py moments     # an hour

The embedded base, `configs/dog.py`, the last of five photos held out. The runs of a table have the same class images,
examples, noise and times, and compute in float32; the last row, with another seed, says how much two runs differ
anyway. "frozen": 300 steps of LoRA, the frozen kernels differ. "moments": 2,000 steps of all weights with one image of
the subject and one of the class, the optimizer differs. Losses are means of the last 100 steps and of the second half,
and of the held-out photo and the class with fixed noise.
"""

import argparse
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kept import kept

from dreambooth_jax.devices import runtime
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs.held_out import held_out_data, make_loss
from dreambooth_jax.runs.job import fresh_state, held, lower_steps, read_shapes, resident_data, training_size
from dreambooth_jax.runs.setup import begin, prepare_data, set_up

ROOT = Path(__file__).parent.parent
OTHER_SEED = {"float32, another seed": {"seed": 1}}
TABLES = {
    "frozen": {
        "float32": {},
        "bfloat16": {},
        "int8": {"frozen_dtype": "int8"},
        **OTHER_SEED,
    },
    "moments": {
        "AdamW, float32": {},
        "AdamW, bfloat16": {"moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"},
        "AdamW, int8": {"moment_dtype": "int8", "second_moment_dtype": "int8"},
        "Muon, float32": {"optimizer": "muon"},
        **OTHER_SEED,
    },
}
# table -> preset of configs/dog.py, fields of all its rows, steps
RUNS = {"frozen": ("tiny,lora", {}, 300), "moments": ("tiny", {"batch_size": 1}, 2000)}


def run_one(table: str, arm: str, steps: int, folder: Path) -> dict:
    """Trains one row; the losses, and the bytes of what is frozen."""
    preset, fields, _ = RUNS[table]
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"](preset)
    config.update(workdir=str(folder / arm.replace(", ", "_")), instance_images=str(ROOT / config.instance_images))
    config.update(class_images=str(folder / "class_images"), create_class_images=True, steps=steps)
    config.update(held_out_images="1", evaluate_every=100, sample_every=100, **fields | TABLES[table][arm])
    run = set_up(config)
    job = run.job
    exact = read_params(run.pipeline, run.mesh)
    data = prepare_data(run, exact)
    tests = held_out_data(job, exact, run.held_out[0], data[0].prior)
    (training,), _ = resident_data(job, data)
    params = held(job, read_params(run.pipeline, run.mesh, read_shapes(job)))
    if (table, arm) == ("frozen", "bfloat16"):
        params = {n: x.astype(jnp.bfloat16).astype(x.dtype) if n.endswith("kernel") else x for n, x in params.items()}
    trainable, frozen, key = begin(job, params)
    state, test = fresh_state(job, trainable), make_loss(job, training_size(config))
    before = test(state.trainable, frozen, tests, key)
    advance = lower_steps(job, state, frozen, training, key).compile()
    losses = []
    for start in range(0, steps, config.steps_per_call):
        count = min(config.steps_per_call, steps - start)
        state, metrics = advance(state, frozen, training, key, jnp.asarray(count, jnp.int32))
        losses += np.asarray(metrics.loss)[:count].tolist()
    after = test(state.trainable, frozen, tests, key)
    moments = {
        f"{name} {when}": float(getattr(found, name))
        for when, found in (("before", before), ("after", after))
        for name in ("instance", "prior")
    }
    size = sum(x.nbytes for n, x in frozen.items() if not n.startswith("vae"))
    means = {"last 100": float(np.mean(losses[-100:])), "half": float(np.mean(losses[steps // 2 :]))}
    return means | moments | {"bytes": size}


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--steps", type=int, help="default: 300 for frozen, 2000 for moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/fewer_bits"))
    options = parser.parse_args()
    steps, folder = options.steps or RUNS[options.table][2], options.folder / options.table
    columns = ("last 100", "half", "instance before", "instance after", "prior before", "prior after")
    heads = ("loss, last 100 steps", "second half", "held-out photo, before", "after", "class, before", "after")
    print(f"| {options.table} | {' | '.join(heads)} |")
    print("|---" * 7 + "|")
    for arm in TABLES[options.table]:
        row = kept(folder / f"{steps}.jsonl", arm, lambda arm=arm: run_one(options.table, arm, steps, folder))
        print(f"| {arm} | " + " | ".join(f"{row[name]:.4f}" for name in columns) + " |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
