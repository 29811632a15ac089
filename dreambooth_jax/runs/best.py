"""The best checkpoint of a run by its scores, kept in workdir/best: weights alone, untouched by `keep_last`."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.files.atomic import is_remote
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.command import BEST

# step -> measure -> value; step 0: the base; "best": the best step so far, 0 for none
Rows = Mapping[int, Mapping[str, float]]


def best_step(rows: Rows, step: int, *, max_prompt_loss: float, max_copy: float) -> int | None:
    """The step up to `step` with the highest DINO among those that follow prompts and copy no photo, or None.

    Args:
        max_prompt_loss: CLIP-T that a step may lose against the base, besides the subject's gap (`watch.subject_gap`).
        max_copy: cosine in DINO of a generated picture and a photo that no picture reaches.
    """
    least = rows[0]["CLIP-T"] - rows[0].get("gap", 0.0) - max_prompt_loss
    good = {
        number: row["DINO"]
        for number, row in rows.items()
        if 0 < number <= step and row["CLIP-T"] >= least and row["copy"] < max_copy
    }
    return max(good, key=lambda number: (good[number], -number), default=None)


def is_over(config: ConfigDict, rows: Rows, step: int) -> bool:
    """Whether `patience` ends the run after `step`: as many scored steps were no better than one before them."""
    if not config.patience or "best" not in rows.get(step, {}):
        return False
    return len([number for number in rows if rows[step]["best"] < number <= step]) >= config.patience


@contextlib.contextmanager
def open_best(
    workdir: str | os.PathLike, config: ConfigDict, done: int, record: Mapping[str, Any]
) -> Iterator[ocp.CheckpointManager | None]:
    """The checkpoints of `workdir`/best for a run that goes on from step `done`; None without `keep_best`.

    Args:
        record: see `open_checkpoints`.
    """
    if not config.keep_best:
        yield None
        return
    folder = epath.Path(workdir) / BEST
    if not done and is_remote(folder) and runtime.is_first_process() and folder.exists():  # elsewhere it is set aside
        folder.rmtree()
    checkpoint.finish_deletions(folder, keep_last=1)
    runtime.wait_for_all("the best checkpoint of another run is gone")
    manager = checkpoint.open_checkpoints(folder, keep_last=1, record=record)
    with checkpoint.closing(manager):
        yield manager


def keep(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Keeps the weights of `state` in the place of those kept before. Returns when they are on the disk.

    A resumed run comes again to the step that it had kept; what is there stays.

    Raises:
        SaveFailed: the disk does not take them.
    """
    if step > max(manager.all_steps(), default=0):
        checkpoint.save(manager, step, state._replace(opt_state={}))
        checkpoint.wait(manager)


def folder_of(workdir: str | os.PathLike, step: int | str | None) -> tuple[epath.Path, int | None]:
    """(folder of checkpoints, step in it) of a run's checkpoint; None: the newest.

    Args:
        step: number, "best", or None for the newest.

    Raises:
        FileNotFoundError: "best", and none was kept.
    """
    newest, best = (epath.Path(workdir) / name for name in ("checkpoints", BEST))
    kept = checkpoint.steps_of(best)
    if step == BEST:
        if not kept:
            raise FileNotFoundError(
                f"{best}: no checkpoint was kept as the best. Train with --config.keep_best=True, or give a number; "
                f"{workdir}/scores.csv has the scores"
            )
        return best, kept[-1]
    number = None if step is None else int(step)
    if number in kept and number not in checkpoint.steps_of(newest):
        return best, number
    return newest, number
