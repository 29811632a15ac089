"""Safetensors files written one tensor at a time: peak memory is the largest tensor."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dreambooth_jax.files.atomic import replacing

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32"}


class Tensor(NamedTuple):
    """A tensor of a file that is to be written: its shape now, its value when its turn comes."""

    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


def as_tensor(value: jax.Array | np.ndarray) -> Tensor:
    """An array as a Tensor, fetched from its device when its turn comes."""
    return Tensor(tuple(value.shape), lambda: np.asarray(value))


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    dtype: DTypeLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file; one that is there stays until the new one is whole.

    Args:
        path: its folder is made if absent.
        tensors: key -> shape and value, in the order of the file.
        dtype: stored precision: float32, float16 or bfloat16.
        metadata: `__metadata__` of the file.
    """
    dtype = jnp.dtype(dtype)  # NumPy's own do not have bfloat16
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.value(), dtype).tobytes())
