"""Train states on disk, with Orbax: asynchronous, atomic, restorable on another mesh.

A checkpoint has one item for the trained weights, one for their average if there is one, and one for the optimizer, so
that sampling and export read no optimizer state. Beside the items lies `run.json`: a digest of each item, how many
checkpoints were kept, and the record of the run that saved it (its config, fingerprints of its data). It is written
before the checkpoint becomes visible: every checkpoint has it, except those of versions before it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.files.atomic import is_remote, sync, write_atomic
from dreambooth_jax.runs.records import RECORD, DamagedCheckpoint, is_complete, read_record, steps_of

KEPT = "kept"  # in run.json: how many checkpoints the process kept that saved this one


def open_checkpoints(
    folder: str | os.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    read_only: bool = False,
    record: Mapping[str, Any] | None = None,
) -> ocp.CheckpointManager:
    """Opens the checkpoints under `folder` (local or gs://), which is made if absent.

    A save runs in the background and becomes visible only when complete; older checkpoints are deleted after that, so
    that a kill at any moment leaves the newest complete one.

    Args:
        keep_last: number of the newest checkpoints to keep.
        keep_every: besides those, keep every checkpoint whose step is a multiple of this.
        read_only: whether to change nothing, as beside a run that writes there.
        record: JSON values to store in every checkpoint; read when the checkpoint is complete.
    """
    path = epath.Path(folder)
    path = path if is_remote(folder) else path.resolve()
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_told)
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
        sys.unraisablehook = _ignore_late_callbacks
        seal = functools.partial(_seal, path, {} if record is None else record, [keep_last, keep_every])
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        )
    return ocp.CheckpointManager(path, options=options)


def _is_told(record: logging.LogRecord) -> bool:
    """Whether to show a log record. Orbax logs errors that it also raises, and the read-only mode of a folder. If
    several parts of a save fail, Orbax raises one error and asyncio logs the others."""
    if record.name == "asyncio":
        return "never retrieved" not in record.getMessage()
    repeated = record.levelno >= logging.ERROR or "read only" in str(record.msg)
    return not (repeated and "orbax" in record.pathname)


def _ignore_late_callbacks(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides the errors of TensorStore's callbacks into the event loop that Orbax closes after a failed save."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _is_unfinished(path: epath.Path) -> bool:
    """Whether a folder is an incomplete checkpoint: of a running save, or of one that its process did not finish."""
    return ".orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and not is_complete(path))


def _seal(folder: epath.Path, record: Mapping[str, Any], kept: list[int | None]) -> None:
    """Writes digests and record into the checkpoint that is about to become visible."""
    for unfinished in filter(_is_unfinished, folder.iterdir()):
        items = sorted(path for path in unfinished.iterdir() if path.is_dir())
        # Buckets verify their contents themselves; reading them back would cost as much as the save.
        digests = {} if is_remote(folder) else {path.name: _digest(Path(path), to_disk=True) for path in items}
        text = json.dumps({"digests": digests, KEPT: kept, **record}, indent=1)
        write_atomic(unfinished / RECORD, text.encode())


def _digest(item: Path, *, to_disk: bool = False) -> str:
    """Digest of an item's files, their names and sizes."""
    total = hashlib.blake2b(digest_size=16)
    for folder, folders, names in os.walk(item):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "blake2b").digest()
            total.update(f"{path.relative_to(item)} {path.stat().st_size} ".encode() + content)
            if to_disk:
                sync(path)
        if to_disk:
            sync(Path(folder))
    return total.hexdigest()


def verify(folder: str | os.PathLike, step: int, items: tuple[str, ...] = ()) -> None:
    """Compares the bytes of a checkpoint's items (default: all) with the digests that were saved with them.

    Raises:
        DamagedCheckpoint: naming the items that differ.
    """
    place = epath.Path(folder) / str(step)
    digests = read_record(folder, step).get("digests", {})
    wrong = [
        name
        for name, digest in digests.items()
        if (not items or name in items) and (not (place / name).is_dir() or _digest(Path(place / name)) != digest)
    ]
    if wrong:
        raise DamagedCheckpoint(f"{place} is damaged: the bytes of {', '.join(wrong)} are not those that were saved")


def finish_deletions(folder: str | os.PathLike, *, keep_last: int, keep_every: int | None = None) -> None:
    """Completes the deletions of checkpoints that a kill interrupted. Call it after `set_aside_damaged`.

    Deleted are checkpoints that `open_checkpoints` with the same arguments would not keep: those that are not whole;
    and the others where the newest was saved with these arguments, whose process was about to delete them.
    """
    if not runtime.is_first_process() or is_remote(folder):
        return
    steps = steps_of(folder)
    surplus = [step for step in steps[:-keep_last] if keep_every is None or step % keep_every]
    was_due = bool(surplus) and _record_of_whole(folder, steps[-1]).get(KEPT) == [keep_last, keep_every]
    for step in surplus:
        if was_due or not _record_of_whole(folder, step):
            shutil.rmtree(Path(folder) / str(step))


def _record_of_whole(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """The record of a checkpoint; empty where its bytes are not those that were saved."""
    with contextlib.suppress(DamagedCheckpoint, OSError):
        verify(folder, step)
        return read_record(folder, step)
    return {}


def set_aside_damaged(folder: str | os.PathLike) -> list[str]:
    """Renames damaged checkpoints, the newest first, until the newest is whole. Nothing is deleted.

    Call it before `open_checkpoints`. With several processes the first one does it; the others wait.

    Returns:
        Lines that say what was found and where it is now.
    """
    lines = []
    if runtime.is_first_process() and not is_remote(folder):
        for step in reversed(steps_of(folder)):
            try:
                verify(folder, step)
                break
            except (DamagedCheckpoint, OSError) as error:
                place = set_aside(Path(folder) / str(step), Path(folder).parent)
                lines.append(f"{error}. It is set aside as {place}")
        if lines:
            left = steps_of(folder)
            lines[-1] += (
                f"; the run goes on from step {left[-1]}" if left else "; no other is left, the run begins anew"
            )
    runtime.wait_for_all("checkpoints are verified")
    return lines


def weights_at(folder: str | os.PathLike, step: int) -> str:
    """A digest of the trained weights of `step`; empty where the checkpoint is gone, or on a bucket."""
    try:
        digests = read_record(folder, step).get("digests", {})
    except DamagedCheckpoint:
        return ""
    return " ".join(digests[name] for name in ("trainable", "ema") if name in digests)


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a folder of checkpoints to a free name in workdir/damaged_checkpoints; returns it."""
    place = _free_name(workdir / "damaged_checkpoints" / path.name)
    place.parent.mkdir(exist_ok=True)
    os.rename(path, place)
    return place


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}_{number}") for number in range(2, 10_000)))
    return next(name for name in names if not name.exists())


def _items(state: TrainState) -> dict[str, Any]:
    items = {"trainable": state.trainable, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}


def nbytes(state: TrainState) -> int:
    """Bytes of a checkpoint of `state`, arrays or ShapeDtypeStructs, before compression."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(_items(state)))


class SaveFailed(OSError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def _told(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns every error of a save into one line with the folder and the remedy."""
    try:
        yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if re.search(r"(?i)no space|RESOURCE_EXHAUSTED|ENOSPC|quota", str(error)):
            reason = "no space left on the disk"
        last = max(steps_of(manager.directory), default=None)
        rest = "from the beginning: nothing was saved before" if last is None else f"from step {last}"
        raise SaveFailed(
            f"{manager.directory}: the checkpoint could not be saved: {reason[:300]}. Make room or mend the folder; "
            f"the same command then goes on {rest}."
        ) from error


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Starts to save `state` as `step`; returns after the arrays are copied off the device.

    Raises:
        SaveFailed: this save or the one before it.
    """
    with _told(manager):
        if step not in manager.all_steps():
            items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
            manager.save(step, args=ocp.args.Composite(**items))


def check(manager: ocp.CheckpointManager) -> None:
    """Raises SaveFailed if a save in the background has failed by now."""
    with _told(manager):
        manager.check_for_errors()


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when every started save is on the disk.

    Raises:
        SaveFailed: one of them was not.
    """
    with _told(manager):
        manager.wait_until_finished()
        if not is_remote(manager.directory):
            sync(Path(manager.directory))  # the name of the new checkpoint


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Closes the manager at the end and completes running saves, after an error too."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            manager.close()
        raise
    wait(manager)
    manager.close()


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int | None = None) -> TrainState | None:
    """The state saved at `step` (default: the newest), or None if there is no checkpoint yet.

    Args:
        like: arrays or ShapeDtypeStructs with the structure, shapes and shardings of the result; the mesh of the save
            may be another.

    Raises:
        ValueError: the checkpoint has another structure or other shapes, or cannot be read.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    found = _restore(manager, step, _items(like))
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
    if not is_remote(manager.directory):
        try:
            verify(manager.directory, step, (item,))
        except DamagedCheckpoint as error:
            others = ", ".join(str(other) for other in sorted(manager.all_steps()) if other != step)
            raise DamagedCheckpoint(f"{error}. Other checkpoints: {others or 'none'} (--step)") from error
    return _restore(manager, step, {item: dict(like)})[item]


def _restore(manager: ocp.CheckpointManager, step: int, items: Mapping[str, Any]) -> ocp.args.Composite:
    """The items of a checkpoint; every error of Orbax becomes one that names the checkpoint."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**_targets(items)))
    except Exception as error:
        place = manager.directory / str(step)
        what = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = f"Move {place} away to go on from the checkpoint before it"
        raise ValueError(f"{place} cannot be restored: {what[:400]}. {remedy}.") from error


def _targets(items: Mapping[str, Any]) -> dict[str, ocp.args.StandardRestore]:
    def target(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return {name: ocp.args.StandardRestore(jax.tree.map(target, item)) for name, item in items.items()}
