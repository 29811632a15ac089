"""Whole train states on disk, with Orbax: asynchronous, atomic, restorable on another mesh."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

State = TypeVar("State")


def open_checkpoints(
    folder: str | os.PathLike, *, keep_last: int = 2, keep_every: int | None = None
) -> ocp.CheckpointManager:
    """The checkpoints under `folder` (local or gs://), which is made.

    A save runs in the background and becomes visible only when complete; older checkpoints are deleted after that, so
    that a kill at any moment leaves the newest complete one.

    Args:
        keep_last: how many of the newest to keep.
        keep_every: besides those, keep every checkpoint whose step is a multiple of this.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    path = epath.Path(folder)
    return ocp.CheckpointManager(path if "://" in str(folder) else path.resolve(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: State) -> None:
    """Begins to save `state` as `step`; the arrays are copied off the device before this returns."""
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(state))


def restore_latest(
    manager: ocp.CheckpointManager, like: State, sharding: Callable[[State], State] | State | None = None
) -> State | None:
    """The newest state, or None if there is none yet.

    Args:
        like: arrays or ShapeDtypeStructs of the same structure.
        sharding: shardings of the same structure to restore onto, whatever mesh the state was saved from; default:
            those of `like`.

    Raises:
        ValueError: the checkpoint has another structure or other shapes (from Orbax, naming them).
    """
    step = manager.latest_step()
    if step is None:
        return None
    shardings = jax.tree.map(lambda x: x.sharding, like) if sharding is None else sharding
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    return manager.restore(step, args=ocp.args.StandardRestore(target))
