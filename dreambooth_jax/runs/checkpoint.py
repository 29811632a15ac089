"""Train states on disk, with Orbax: asynchronous, atomic, restorable on another mesh.

A checkpoint has one item for the trained weights, one for their average if there is one, and one for the optimizer, so
that sampling and export read no optimizer state.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dreambooth_jax.diffusion.step import TrainState


def open_checkpoints(
    folder: str | os.PathLike, *, keep_last: int = 1, keep_every: int | None = None, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints under `folder` (local or gs://), which is made.

    A save runs in the background and becomes visible only when complete; older checkpoints are deleted after that, so
    that a kill at any moment leaves the newest complete one.

    Args:
        keep_last: how many of the newest to keep.
        keep_every: besides those, keep every checkpoint whose step is a multiple of this.
        read_only: touch nothing, such as what a training run beside is writing.
    """
    options = (
        ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        if read_only
        else ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
    )
    path = epath.Path(folder)
    return ocp.CheckpointManager(path if "://" in str(folder) else path.resolve(), options=options)


def _items(state: TrainState) -> dict[str, Any]:
    items = {"trainable": state.trainable, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}


def nbytes(state: TrainState) -> int:
    """Bytes of a checkpoint of `state`, arrays or ShapeDtypeStructs, before compression."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(_items(state)))


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Begins to save `state` as `step`; the arrays are copied off the device before this returns."""
    if step not in manager.all_steps():
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        manager.save(step, args=ocp.args.Composite(**items))


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int | None = None) -> TrainState | None:
    """The state saved at `step` (default: the newest), or None if there is no checkpoint yet.

    Args:
        like: arrays or ShapeDtypeStructs with shardings: what to restore, and where to, whatever mesh saved it.

    Raises:
        ValueError: the checkpoint has another structure or other shapes (from Orbax, naming them).
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    found = manager.restore(step, args=ocp.args.Composite(**_targets(_items(like))))
    return TrainState(found.optimizer["step"], found.trainable, found.optimizer["opt_state"], found.get("ema"))


def restore_weights(
    manager: ocp.CheckpointManager, like: Mapping[str, jax.ShapeDtypeStruct], *, average: bool, step: int | None = None
) -> dict[str, jax.Array]:
    """The trained weights alone, or their average, of `step` (default: the newest).

    Raises:
        FileNotFoundError: no such checkpoint; says which there are.
    """
    step = manager.latest_step() if step is None else step
    if step not in manager.all_steps():
        wanted, found = "" if step is None else f" of step {step}", sorted(manager.all_steps())
        there = f"there are {', '.join(map(str, found))}" if found else "none was saved yet"
        raise FileNotFoundError(f"{manager.directory}: no checkpoint{wanted}; {there}")
    item = "ema" if average else "trainable"
    return manager.restore(step, args=ocp.args.Composite(**_targets({item: dict(like)})))[item]


def _targets(items: Mapping[str, Any]) -> dict[str, ocp.args.StandardRestore]:
    def target(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return {name: ocp.args.StandardRestore(jax.tree.map(target, item)) for name, item in items.items()}
