"""Which of a model's weight files is read: one rule for folders and for the listings of a model hub."""

import os
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from dreambooth_jax.files.json_text import parse_json

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")


class WeightsError(ValueError):
    """Weights are absent, in a refused format, or do not fit the model."""


def converting_command(pickle: str | os.PathLike, target: str | os.PathLike) -> str:
    """The command that writes the tensors of a pickle as safetensors, where PyTorch is installed."""
    return (
        'python -c "import sys, torch; from safetensors.torch import save_file; '
        "x = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "x = x.get('state_dict', x.get('string_to_param', x)); "
        "save_file({k: v.contiguous() for k, v in x.items() if hasattr(v, 'contiguous')}, sys.argv[2])\" "
        + shlex.join([str(pickle), str(target)])
    )


def choose(names: Iterable[str], where: str, base: str) -> list[str]:
    """The weight files to read of those in a model's folder: an index first, if there is one, then files.

    A set is one file or its shards; variants such as fp16 are sets of their own. The plain name is preferred; a single
    variant is taken as it is.

    Args:
        names: files of the folder.
        where: the folder, for errors.
        base: the pipeline's folder or hub name, for the command that converts it.

    Raises:
        WeightsError: there are no safetensors, or several variants and none with a plain name.
    """
    names = sorted(names)
    sets: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".safetensors"):
            sets.setdefault(_SHARD.sub("", name), []).append(name)
    for name in names:
        if match := _INDEX.search(name):
            key = f"{name[: match.start()]}{match[1] or ''}.safetensors"
            sets[key] = [name, *(n for n in sets.get(key, []) if _SHARD.search(n))]
    plain = [name for name in WEIGHT_FILES if name in sets]
    if plain or len(sets) == 1:
        return sets[plain[0] if plain else next(iter(sets))]
    if sets:
        raise WeightsError(
            f"{where}: several weight files, {', '.join(sorted(sets))}, and none with a plain name, "
            f"{' or '.join(WEIGHT_FILES)}. Keep or rename the one to read."
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        converted = base.replace("/", "--") if not Path(base).exists() else base
        raise WeightsError(
            f"{where}: only pickled weights ({', '.join(pickles)}), which can run code when opened and are refused. "
            "Convert the base once, where PyTorch is installed, and train from the new folder:\n"
            '  python -c "import sys; from diffusers import DiffusionPipeline as P; '
            'P.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" '
            + shlex.join([base, f"{converted}-safetensors"])
        )
    raise WeightsError(f"{where}: no weights. Expected {' or '.join(WEIGHT_FILES)}.")


def variant_of(name: str, variant: str) -> str:
    """ "model.safetensors" -> "model.fp16.safetensors" for the variant "fp16"; `name` itself for ""."""
    head, _, suffix = name.rpartition(".")
    return f"{head}.{variant}.{suffix}" if variant else name


def check_alone(folder: Path, files: Collection[str]) -> None:
    """Checks that a model's folder, if it is there, holds no weights but those that are to be written into it.

    Args:
        files: names of what is written.

    Raises:
        WeightsError: there are others, which a reader would take for the model's, or could not tell from them.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [n for n in names if (n.endswith(".safetensors") or _INDEX.search(n)) and n not in files]:
        raise WeightsError(
            f"{folder} holds weights of an earlier model, {', '.join(others)}: what is written beside them would not "
            "be read. Remove them, or write into another folder."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or an index's shards.

    Raises:
        WeightsError: there are none, an index cannot be read, or it names files that are not in the folder.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder. A base has a folder for each of its models.")
    chosen = choose((path.name for path in folder.iterdir()), str(folder), str(folder.parent))
    if not chosen[0].endswith(".json"):
        return [folder / name for name in chosen]
    index = folder / chosen[0]
    names = _named_in(index)
    outside = [name for name in names if PurePosixPath(name).name != name or "\\" in name]
    if outside:
        raise WeightsError(f"{index} names files outside of its folder, which are not opened: {', '.join(outside)}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise WeightsError(f"{index} names shards that are not there: {', '.join(absent)}")
    return [folder / name for name in names]


def _named_in(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(map(str, names))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not a readable index of weights ({error!r}). Download it again.") from error
