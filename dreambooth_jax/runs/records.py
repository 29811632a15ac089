"""What a checkpoint says of its run, beside the arrays: its step, its config, its digests. Without JAX."""

import os
from typing import Any

from etils import epath

from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.runs.config import ConfigError, wrong_kinds
from dreambooth_jax.runs.config_file import read_json, with_tuples

RECORD = "run.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint's bytes are not those that were saved."""


def is_complete(path: epath.Path) -> bool:
    """Whether a folder is a complete checkpoint. Orbax renames the folder at the end of a save; in a Google bucket,
    which has no renaming, it writes a further file."""
    return path.name.isdigit() and (not str(path).startswith("gs://") or (path / "commit_success.txt").exists())


def steps_of(folder: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints under `folder`, ascending."""
    folder = epath.Path(folder)
    return sorted(int(path.name) for path in folder.iterdir() if is_complete(path)) if folder.exists() else []


def read_record(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """What the run stored in the checkpoint of `step`; empty for versions that stored nothing.

    Raises:
        DamagedCheckpoint: it is not JSON, or its parts are of other types than a run writes.
    """
    path = epath.Path(folder) / str(step) / RECORD
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("digests"), dict):
        raise DamagedCheckpoint(f"{path}: no digests in it")
    for part in ("config", "fingerprints"):
        if not isinstance(found.get(part, {}), dict):
            raise DamagedCheckpoint(f"{path}: {part} is no JSON object")
    if wrong := wrong_kinds(with_tuples(found.get("config", {}))):
        raise DamagedCheckpoint(f"{path}: {'; '.join(wrong)}")
    return found


def earlier_config(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The config of the run that saved the checkpoint of `step`: the checkpoint's copy, else config.json.

    Raises:
        ConfigError: neither is there, or config.json is damaged.
        DamagedCheckpoint: see `read_record`.
    """
    if config := read_record(workdir / "checkpoints", step).get("config"):
        return config
    try:
        config = read_json(workdir / "config.json")
        if wrong := wrong_kinds(with_tuples(config)):
            raise ConfigError("; ".join(wrong))
        return config
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} holds checkpoints, and the config they were trained with cannot be read ({error}). Restore "
            "config.json, or give another --config.workdir."
        ) from error
