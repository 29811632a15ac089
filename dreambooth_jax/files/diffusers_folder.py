"""A pipeline folder as diffusers writes it: model_index.json, scheduler, tokenizers and one folder per model."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.models.spec import UnsupportedConfig

if TYPE_CHECKING:  # the help of commands needs no JAX
    from jax.typing import DTypeLike

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
# A hub folder's safety checker and image processor are not read, so a written index must not name them.
_NOT_WRITTEN = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")


def components(index: Mapping[str, Any]) -> list[str]:
    """The folders that a model_index.json names and this library reads."""
    named = [name for name, value in index.items() if isinstance(value, list) and value and value[-1] is not None]
    return [name for name in named if name not in _NOT_WRITTEN]


def folder_files(folder: Path) -> list[Path]:
    """The files of a pipeline folder: model_index.json and those in its components' folders, nothing else below it."""
    inside = (folder / name for name in components(read_json(folder, INDEX)))
    return [folder / INDEX, *(path for part in inside for path in sorted(part.glob("*")) if path.is_file())]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a pipeline folder.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedConfig: the file is not a JSON object; names it.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {folder} is no diffusers pipeline folder")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedConfig(f"{path}: not readable JSON ({error}). Download the file again.") from error
    if not isinstance(config, dict):
        raise UnsupportedConfig(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes model_index.json without the components that this library does not write."""
    absent = {name: [None, None] for name in _NOT_WRITTEN if name in index}
    checked = {"requires_safety_checker": False} if "requires_safety_checker" in index or absent else {}
    write_atomic(folder / INDEX, (json.dumps(dict(index) | absent | checked, indent=2) + "\n").encode())


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a scheduler or tokenizer; nothing to do where a base is written in its own folder."""
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def opens_in_float32(config: Mapping[str, Any], dtype: "DTypeLike | None") -> dict[str, Any]:
    """`config` with float32 as the dtype in which transformers opens the model.

    transformers loads in the config's dtype, else the file's; diffusers loads in float32. Setting a text encoder's
    dtype to float32 keeps the parts of a half-precision folder in one dtype.
    """
    if "architectures" not in config:
        return dict(config)
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return dict(config) | dict.fromkeys(named or ["dtype"] * (dtype is not None), "float32")
