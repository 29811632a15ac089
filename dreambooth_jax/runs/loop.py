"""The training loop: calls of the compiled step, and what is due between them."""

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import Reporter, check_finite


@dataclasses.dataclass
class Progress:
    """What a run has reached. The thread that saves on a signal reads it too (see `runs.preemption`).

    The loop changes it only inside `guard.in_loop()`; the other thread reads it only outside.

    Attributes:
        step: number of steps done.
        state: train state after them.
        late: (steps before the call, metrics, number of steps) of the last call, until it is reported.
    """

    step: int
    state: TrainState
    late: tuple[int, Metrics, int] | None = None


class Sheets(NamedTuple):
    """Pictures of the run.

    Attributes:
        before: paints the base's pictures, before the first step.
        paint: (state, step) -> paints the sheet of a step.
        is_missing: step -> whether the sheet that is due at that step is not there.
        ends: step -> whether its scores end the run.
    """

    before: Callable[[TrainState], None]
    paint: Callable[[TrainState, int], None]
    is_missing: Callable[[int], bool]
    ends: Callable[[int], bool] = lambda step: False


class Store(NamedTuple):
    """Checkpoints of the run.

    Attributes:
        save: (step, state) -> begins to save; the arrays are copied before it returns.
        check: raises an error if a save in the background has failed.
        wait: returns when everything that was begun is on the disk.
    """

    save: Callable[[int, TrainState], None]
    check: Callable[[], None]
    wait: Callable[[], None]


def loop(
    config: ConfigDict,
    progress: Progress,
    advance: Callable[[TrainState, np.int32], tuple[TrainState, Metrics]],
    *,
    store: Store,
    sheets: Sheets,
    reporter: Reporter,
    guard: Preemption,
    agree: Callable[[bool], bool],
    inspect: Callable[[TrainState, int], None] = lambda state, steps: None,
    alike: Callable[[int], int] = lambda step: sys.maxsize,
) -> None:
    """Calls `advance(state, count)` until all steps are done; reports, saves and paints in between.

    Metrics are read one call late, so that the device never waits for the host.

    Args:
        progress: changed in place.
        agree: whether to leave after this call, given whether this process was asked to.
        inspect: called once with the state after the first two or more steps, and their number.
        alike: step -> number of steps from it on that are of one program, and can be one call.

    Raises:
        NonFiniteLoss: a loss, a gradient or the weights are not finite; the checkpoint before is kept.
    """

    def report_late() -> None:
        if progress.late is not None:
            late, progress.late = progress.late, None
            reporter.record(*late)

    def save() -> None:
        report_late()  # a state that is not finite must not replace one that is
        check_finite(progress.state.trainable, progress.step)
        reporter.flush()
        store.save(progress.step, progress.state)

    def save_and_wait() -> None:
        if progress.step > 0:
            save()
        store.wait()

    first, inspected = progress.step, False
    guard.before_leaving(save_and_wait)
    if progress.step == 0:
        sheets.before(progress.state)
    if sheets.is_missing(progress.step):  # the run was stopped between its save and its sheet
        sheets.paint(progress.state, progress.step)
    while progress.step < config.steps and not sheets.ends(progress.step):
        with guard.in_loop():
            until = next_stop(progress.step, config)
            while progress.step < until:
                count = min(config.steps_per_call, until - progress.step, alike(progress.step))
                progress.state, metrics = advance(progress.state, np.int32(count))
                report_late()
                store.check()
                progress.late = (progress.step, metrics, count)
                progress.step += count
                if not inspected and progress.step >= first + 2:
                    inspect(progress.state, progress.step - first)
                    inspected = True
                if agree(guard.requested):
                    guard.leave()
            if progress.step % config.save_every == 0 or progress.step == config.steps:
                save()
            report_late()  # here, so that nothing is half reported when the process leaves while it paints
        if is_painted(progress.step, config):
            sheets.paint(progress.state, progress.step)
    if progress.step < config.steps:
        with guard.in_loop():
            save()
    guard.before_leaving(store.wait)
    reporter.close()


def next_stop(step: int, config: ConfigDict) -> int:
    """The next step at which something is saved or painted."""
    return min(config.steps, *(step - step % every + every for every in (config.save_every, config.sample_every)))


def is_painted(step: int, config: ConfigDict) -> bool:
    """Whether a sheet is due after `step` steps."""
    return step % config.sample_every == 0 or step == config.steps
