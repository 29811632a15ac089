"""What the training loop costs over the bare compiled step, on the embedded base: reports, progress bar, signals.

    python benchmarks/loop.py

Rounds of the bare call and of the whole loop alternate, so that a machine that is busy elsewhere slows both alike.
"""

import contextlib
import io
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dreambooth_jax.devices import runtime
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs.checkpoint import open_checkpoints
from dreambooth_jax.runs.job import lower_steps
from dreambooth_jax.runs.loop import Progress, Sheets, Store, loop
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.setup import begin, prepare_data, set_up, start_state

ROOT = Path(__file__).parent.parent
ROUNDS, STEPS = 5, 60


class Enough(Exception):
    """Ends the loop, which would otherwise run to the last step, save and paint."""


def main() -> None:
    runtime.start()
    with tempfile.TemporaryDirectory() as folder:
        config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
        config.instance_images = str(ROOT / config.instance_images)
        config.workdir, config.num_class_images = folder, 8
        config.steps = config.save_every = config.sample_every = 10**6
        run = set_up(config)
        params = read_params(run.pipeline, run.mesh)
        trainable, frozen, key = begin(run.job, params)
        with contextlib.redirect_stderr(io.StringIO()):
            (data,) = prepare_data(run, run.job.method.combine(frozen, trainable))
        manager = open_checkpoints(Path(folder) / "checkpoints")
        state = start_state(run.job, trainable, manager)
        steps = lower_steps(run.job, state, frozen, data, key).compile()

        bare, looped = [], []
        state, _ = steps(state, frozen, data, key, jnp.asarray(10))
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(STEPS // config.steps_per_call):
                state, _ = steps(state, frozen, data, key, jnp.asarray(config.steps_per_call))
            jax.block_until_ready(state)
            bare.append((time.perf_counter() - started) / STEPS)

            started = time.perf_counter()
            last = int(state.step) + STEPS
            latest = [state]

            def advance(state, count, last=last, latest=latest):
                if int(state.step) >= last:
                    raise Enough
                latest[0], metrics = steps(state, frozen, data, key, count)
                return latest[0], metrics

            with Preemption() as guard, contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Enough):
                loop(
                    config,
                    Progress(int(state.step), state),
                    advance,
                    store=Store(lambda *_: None, lambda: None, lambda: None),
                    sheets=Sheets(lambda _: None, lambda *_: None, lambda _: False),
                    reporter=Reporter(run.workdir, first_step=int(state.step), steps=config.steps),
                    guard=guard,
                    agree=lambda requested: requested,
                )
            looped.append((time.perf_counter() - started) / STEPS)
            state = latest[0]
    ratios = [b / a for a, b in zip(bare, looped, strict=True)]
    print(f"bare step  {1e3 * statistics.median(bare):8.1f} ms (median of {ROUNDS} rounds of {STEPS} steps)")
    print(f"in the loop{1e3 * statistics.median(looped):8.1f} ms")
    print(f"loop / bare: median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
