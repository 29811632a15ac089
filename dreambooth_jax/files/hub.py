"""From the name of a base to its folder on this machine: the one resolver of every command."""

import os
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dreambooth_jax.files.diffusers_folder import INDEX, components
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.layouts import split_base
from dreambooth_jax.files.weight_files import WEIGHT_FILES, WeightsError, choose, converting_command

PICKLE = "pytorch_model.bin"  # of transformers
_TINY = Path(__file__).parent.parent / "tiny"
EMBEDDED_FOLDER = _TINY / "base"  # with the models that judge pictures of its world
# Bases that ship with the package: a latent model, and the stages of a cascade in pixels.
EMBEDDED = {
    "tiny": EMBEDDED_FOLDER,
    "tiny_stage1": _TINY / "cascade" / "stage1",
    "tiny_stage2": _TINY / "cascade" / "stage2",
}


def resolve_base(base: str) -> Path:
    """The local folder of a base: one of `EMBEDDED` (ship with the package), a folder, or a model hub name, which is
    fetched.
    Of "model.safetensors@TEMPLATE" (files/layouts.py) it is the template's.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
        WeightsError: the hub has the base, but not in a format that is read; or the folder holds a pipe.
    """
    given = base
    file, base = split_base(base)
    if base in EMBEDDED:
        return EMBEDDED[base]
    if (local := Path(os.path.expanduser(base))).is_dir():
        return _readable(local)
    if not is_hub_name(base):
        raise FileNotFoundError(
            f"base = {base!r}: no such folder. Give a diffusers folder, a hub name such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5', or 'tiny' for the model that ships with the package."
        )
    try:
        return _fetch(base, weights=file is None)
    except WeightsError:
        raise
    except Exception as error:  # offline, unknown or gated: the hub client has a type for each
        cached = _cached(base)
        if cached is not None:
            return cached
        if file is not None:
            raise FileNotFoundError(
                f"base = {given!r}: configs and tokenizer of this kind of file come from {base}, which is no folder, "
                f"and the model hub did not give it ({error}). Check the network, or name a folder of such a base: "
                f"{file}@/path/to/folder"
            ) from error
        raise FileNotFoundError(
            f"base = {base!r}: no such folder, and the model hub did not give it ({error}). "
            "Check the name and the network, or give a local folder with --config.base=/path."
        ) from error


def is_hub_name(base: str) -> bool:
    """Whether a base that is no folder of this machine has the form of a hub's name, OWNER/NAME."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).is_dir()


def _readable(folder: Path) -> Path:
    """The folder of a base, if no reader can wait for ever at one of its files."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise WeightsError(f"{path}: not a regular file but a pipe, a socket or a device. Remove or replace it.")
    return folder


def resolve_model(name: str) -> Path:
    """The local folder of a single model, such as DINO's: a folder, or a model hub name, which is fetched.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
        WeightsError: no safetensors in it; with the command that converts a pickle.
    """
    from huggingface_hub import snapshot_download

    folder, fetch = Path(os.path.expanduser(name)), ""
    if not folder.is_dir():
        fetch = f"hf download {shlex.quote(name)} {PICKLE} && "
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
        except Exception as error:  # offline, unknown or gated: the hub client has a type for each
            raise FileNotFoundError(
                f"{name!r}: no such folder, and the model hub did not give it ({error}). Check the name and the "
                "network, or give a local folder."
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{name!r}: no weights as safetensors; pickled ones can run code when opened and are refused. Convert them "
            "once, where PyTorch is installed, and give the same name again:\n"
            f"  {fetch}{converting_command(folder / PICKLE, folder / WEIGHT_FILES[-1])}"
        )
    return folder


def _fetch(base: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    names = HfApi().list_repo_files(base)
    index = parse_json(Path(hf_hub_download(base, INDEX)).read_text(encoding="utf-8"))
    return Path(snapshot_download(base, allow_patterns=[INDEX, *wanted_files(names, components(index), base, weights)]))


def wanted_files(names: Sequence[str], folders: Sequence[str], base: str, weights: bool = True) -> list[str]:
    """The files of a repository that the library reads: configs, tokenizers and one set of weights per model.

    Raises:
        WeightsError: see `choose`.
    """
    inside = defaultdict(list)
    for name in names:
        folder, _, rest = name.partition("/")
        if folder in folders and rest and "/" not in rest:
            inside[folder].append(rest)
    wanted = []
    for folder, files in inside.items():
        is_model = "config.json" in files
        own = [name for name in files if name.endswith(".json") or folder.startswith("tokenizer")]
        own += choose(files, f"{base}/{folder}", base) if is_model and weights else []
        wanted += [f"{folder}/{name}" for name in dict.fromkeys(own)]
    return wanted


def _cached(base: str) -> Path | None:
    """The snapshot of an earlier download, for work without the network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base, local_files_only=True))
    except Exception:  # nothing in the cache; the hub client has several types for it
        return None
    return folder if (folder / INDEX).is_file() else None
