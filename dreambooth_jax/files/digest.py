"""A digest that tells one base's weights from another's, whatever the folder is called."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dreambooth_jax.files.diffusers_folder import INDEX, components, read_json
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.weight_files import WeightsError, weight_files

_BLOCK = 4096  # bytes
_PIECE = 2**22  # bytes read at once
_LFS = b"version "  # first 8 bytes of a pointer


def check_files(folder: Path) -> None:
    """Opens the configs of a pipeline folder's models and the headers of their weights, which is cheap.

    Raises:
        FileNotFoundError, UnsupportedConfig: a config is not there or no JSON.
        WeightsError: weights are absent, cut off, or in a format that is not read.
    """
    models = [name for name in components(read_json(folder, INDEX)) if (folder / name / "config.json").is_file()]
    for name in models:
        read_json(folder, f"{name}/config.json")
    _by_part(folder, models)


def weights_digest(folder: Path, parts: Iterable[str]) -> str:
    """BLAKE2b over names, shapes and samples of all tensors: the first, middle and last 4 KiB of each.

    A few MB are read of any model, before anything slow: another base is found. `parts_digests` finds one flipped bit.
    Independent of file names and of the division into shards.

    Args:
        folder: of the base, with a subfolder for every part; or a single safetensors file.
        parts: names of the subfolders.

    Returns:
        32 hexadecimal digits.

    Raises:
        WeightsError: a part has no weights.
    """
    tensors = {f"{part}.{name}": found for part, own in _by_part(folder, parts).items() for name, found in own.items()}
    digest = hashlib.blake2b(digest_size=16)
    for name, (path, dtype, shape, start, stop) in sorted(tensors.items()):
        digest.update(f"{name} {dtype} {shape}\n".encode())
        with path.open("rb") as file:
            for offset in (start, max(start, (start + stop - _BLOCK) // 2), max(start, stop - _BLOCK)):
                file.seek(offset)
                digest.update(file.read(min(_BLOCK, stop - offset)))
    return digest.hexdigest()


def parts_digests(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """Part, or "file" for a single file -> SHA-256 over names, shapes and all bytes of its tensors.

    1.7 GB a second where the processor has instructions for it. Arguments and errors are `weights_digest`'s, and so is
    the independence of file names and shards.
    """
    return {part or "file": _whole_digest(tensors) for part, tensors in _by_part(folder, parts).items()}


def _whole_digest(tensors: Mapping[str, "_Tensor"]) -> str:
    digests = {}
    in_order = sorted(tensors.items(), key=lambda entry: (str(entry[1].path), entry[1].start))  # disks read on
    for name, (path, dtype, shape, start, stop) in in_order:
        own = hashlib.sha256(f"{name} {dtype} {shape}\n".encode())
        with path.open("rb") as file:
            file.seek(start)
            for left in range(stop - start, 0, -_PIECE):
                own.update(file.read(min(_PIECE, left)))
        digests[name] = own.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


class _Tensor(NamedTuple):
    """Place of a tensor in a safetensors file: first byte and end."""

    path: Path
    dtype: str
    shape: list[int]
    start: int
    stop: int


def _by_part(folder: Path, parts: Iterable[str]) -> dict[str, dict[str, _Tensor]]:
    files = {"": [folder]} if folder.is_file() else {part: weight_files(folder / part) for part in sorted(parts)}
    return {part: _tensors(paths) for part, paths in files.items()}


def _tensors(paths: Iterable[Path]) -> dict[str, _Tensor]:
    """The tensors by their names, from the headers of safetensors files.

    Raises:
        WeightsError: a file is no safetensors file, or is cut off.
    """
    found = {}
    for path in paths:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            try:
                header = parse_json(file.read(size)) if size < path.stat().st_size else None
                places = {name: about for name, about in header.items() if name != "__metadata__"}
                for name, about in places.items():
                    ends = (8 + size + offset for offset in about["data_offsets"])
                    found[name] = _Tensor(path, about["dtype"], about["shape"], *ends)
                if max((found[name].stop for name in places), default=0) > path.stat().st_size:
                    raise ValueError("it ends too early")
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                pointer = " but a pointer of Git LFS (git lfs pull fetches the file)" if start == _LFS else ""
                raise WeightsError(f"{path}: not a readable safetensors file{pointer}. Download it again.") from error
    return found
