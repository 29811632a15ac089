"""A training run from its plan to its last step."""

import contextlib
import functools
from collections.abc import Callable

import jax

from dreambooth_jax.devices import runtime
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.job import held_shapes, lower_steps
from dreambooth_jax.runs.loop import Progress, Store, loop
from dreambooth_jax.runs.plan_text import check_space, farewell, plan_text
from dreambooth_jax.runs.preemption import Agreement, Preemption
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.samples import sheet_is_missing, sheets_of
from dreambooth_jax.runs.setup import Run, begin, prepare_data, start_state


def train(
    run: Run,
    guard: Preemption,
    *,
    read: Callable[..., Params] = read_params,
    compile_steps: Callable[[jax.stages.Lowered], jax.stages.Compiled] = jax.stages.Lowered.compile,
    reporter: Callable[..., Reporter] = Reporter,
) -> None:
    """Reads the weights, prepares the data and runs the loop to its end.

    Args:
        guard: answers signals.
        read: reads the base's weights, (pipeline, mesh, shapes) -> params.
        compile_steps: compiles the training steps.
        reporter: opens the reports, see `Reporter`.
    """
    config = run.config
    manager = checkpoint.open_checkpoints(
        run.workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every or None
    )
    with contextlib.closing(manager):  # also after an error: what is being saved becomes complete
        guard.before_leaving(manager.wait_until_finished)
        done = manager.latest_step() or 0
        if runtime.is_first_process():
            print(plan_text(run, done), flush=True)
        if done < config.steps or sheet_is_missing(run, done):
            check_space(run, stored=len(manager.all_steps()))
            params = read(run.pipeline, run.mesh, held_shapes(run.job))
            trainable, frozen, key = begin(run.job, params)
            del params
            # The base still, in the form that the samples' painter takes: painting compiles once.
            data = prepare_data(run, run.job.method.combine(frozen, trainable))
            state = start_state(run.job, trainable, manager)
            del trainable
            steps = compile_steps(lower_steps(run.job, state, frozen, data, key))
            progress = Progress(int(state.step), state)
            del state
            with contextlib.nullcontext() if runtime.is_alone() else guard.deferred():
                loop(
                    config, progress, lambda state, count: steps(state, frozen, data, key, count),
                    store=Store(functools.partial(checkpoint.save, manager), manager.wait_until_finished),
                    sheets=sheets_of(run, frozen),
                    reporter=reporter(run.workdir, first_step=progress.step, steps=config.steps),
                    guard=guard, agree=Agreement(run.mesh),
                )  # fmt: skip
    if runtime.is_first_process():
        print(farewell(run, max(done, config.steps)), flush=True)
