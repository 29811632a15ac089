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
from dreambooth_jax.files.weight_files import WeightsError

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

    Raises:
        WeightsError: a number is too large for `dtype`.
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
        for key, tensor in tensors.items():
            file.write(as_stored(key, tensor.value(), dtype).tobytes())


def as_stored(key: str, value: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A tensor as a file holds it, in row-major order.

    Raises:
        WeightsError: a finite number of it is infinite in `dtype`.
    """
    with np.errstate(over="ignore"):
        array = np.asarray(value, dtype, order="C")
    if not np.isfinite(array).all() and np.isfinite(value).all():
        raise WeightsError(
            f"{key} has numbers up to {np.abs(value).max():.3g}, too large for {array.dtype.name}: store it in "
            "bfloat16 or float32"
        )
    return array
