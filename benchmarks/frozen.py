"""What eight bits of the frozen base do to the loss: one LoRA run over the base in float32, bfloat16 and int8.

    python benchmarks/frozen.py                 # a quarter of an hour on two cores; goes on where it was stopped

The embedded base, `configs/dog.py:tiny,lora`, 300 steps, the last of five photos held out. The three runs have the same
class images, examples, noise and times, and compute in float32: the frozen kernels differ alone. A fourth run, with
another seed, says how much two runs differ anyway. Losses are means of the last 100 steps, and of the held-out photo at
the end with fixed noise.
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
ARMS = {
    "float32": {},
    "bfloat16": {},
    "int8": {"frozen_dtype": "int8"},
    "float32, another seed": {"seed": 1},
}


def run_one(arm: str, steps: int, folder: Path) -> dict:
    """Trains one arm; the losses, and the distance of its factors' differences from the start."""
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]("tiny,lora")
    config.update(workdir=str(folder / arm.replace(", ", "_")), instance_images=str(ROOT / config.instance_images))
    config.update(class_images=str(folder / "class_images"), create_class_images=True, steps=steps)
    config.update(held_out_images="1", evaluate_every=100, sample_every=100, **ARMS[arm])
    run = set_up(config)
    job = run.job
    exact = read_params(run.pipeline, run.mesh)
    data = prepare_data(run, exact)
    tests = held_out_data(job, exact, run.held_out[0], data[0].prior)
    (training,), _ = resident_data(job, data)
    params = held(job, read_params(run.pipeline, run.mesh, read_shapes(job)))
    if arm == "bfloat16":
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
    return {"last": float(np.mean(losses[-100:])), **moments, "bytes": size}


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/frozen"))
    options = parser.parse_args()
    columns = ("last", "instance before", "instance after", "prior before", "prior after")
    print("| frozen kernels | loss, last 100 steps | held-out photo, before | after | class, before | after |")
    print("|---" * 6 + "|")
    for arm in ARMS:
        row = kept(
            options.folder / f"{options.steps}.jsonl", arm, lambda arm=arm: run_one(arm, options.steps, options.folder)
        )
        print(f"| {arm} | " + " | ".join(f"{row[name]:.4f}" for name in columns) + " |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
