"""A digest that tells one base's weights from another's, whatever the folder is called."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dreambooth_jax.files.weight_files import weight_files

_BLOCK = 4096  # bytes


def weights_digest(folder: Path, parts: Iterable[str]) -> str:
    """BLAKE2b over names, shapes and samples of all tensors: the first, middle and last 4 KiB of each.

    A few MB are read of any model. Independent of file names and of the division into shards.

    Args:
        folder: of the base, with a subfolder for every part; or a single safetensors file.
        parts: names of the subfolders.

    Returns:
        32 hexadecimal digits.

    Raises:
        WeightsError: a part has no weights.
    """
    files = {"": [folder]} if folder.is_file() else {part: weight_files(folder / part) for part in sorted(parts)}
    tensors = {f"{part}.{name}": found for part, paths in files.items() for name, found in _tensors(paths).items()}
    digest = hashlib.blake2b(digest_size=16)
    for name, (path, dtype, shape, start, stop) in sorted(tensors.items()):
        digest.update(f"{name} {dtype} {shape}\n".encode())
        with path.open("rb") as file:
            for offset in (start, max(start, (start + stop - _BLOCK) // 2), max(start, stop - _BLOCK)):
                file.seek(offset)
                digest.update(file.read(min(_BLOCK, stop - offset)))
    return digest.hexdigest()


def _tensors(paths: Iterable[Path]) -> dict[str, tuple[Path, str, list[int], int, int]]:
    """Tensor name -> (file, dtype, shape, first byte, end) from the headers of safetensors files."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, about in header.items():
            if name != "__metadata__":
                start, stop = about["data_offsets"]
                found[name] = (path, about["dtype"], about["shape"], 8 + size + start, 8 + size + stop)
    return found
