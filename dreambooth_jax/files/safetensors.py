"""Safetensors files to flat params and back, in the layouts of diffusers and transformers.

One rule covers every tensor: the last part of the name becomes `weight`, and kernels are transposed. The few true
exceptions stand in `_ALIASES` and `_IGNORED`. Each tensor is read once and only the slices that this host's devices
hold, so peak host memory is the placed parameters plus one tensor.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreambooth_jax.files.atomic import replacing, write_atomic
from dreambooth_jax.files.stream import as_stored
from dreambooth_jax.files.weight_files import WeightsError, weight_files
from dreambooth_jax.models.params import Params, Tensors

# Name of a tensor in older files -> name today. Autoencoders saved before diffusers 0.16 have other names in their
# attention; transformers 5 leaves out the wrapper of the text model. An alias is used only if the model has a tensor of
# that name.
_ALIASES = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),
)
Stored = tuple[Path, str, tuple[int, ...], str]  # file, name in the file, shape, dtype
_SPARE = re.compile(r"text_projection\.weight$|(?:text_model\.)?encoder\.layers\.\d+\.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS = 16  # a cache line: transposing in strips is three times as fast as all at once
# Unused tensors: position ids of older transformers, T5's second name of its table, the ViT's pooler.
_IGNORED = ("encoder.embed_tokens.weight", "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


def file_name(name: str) -> str:
    """`conv1.kernel` -> `conv1.weight`; biases keep their name."""
    head, _, last = name.rpartition(".")
    return f"{head}.weight" if last in ("kernel", "scale", "embedding") else name


def to_file_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The permutation that takes our axes to the file's: [h, w, in, out] -> [out, in, h, w], [in, out] -> [out, in]."""
    if not name.endswith(".kernel"):
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def read_model(
    folder: str | os.PathLike,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Params:
    """Reads a model folder's weights, single-file or sharded with an index, float32, float16 or bfloat16.

    Args:
        folder: holds `diffusion_pytorch_model.safetensors` or `model.safetensors`, or an `.index.json` of shards.
        shapes: our name -> shape and dtype of the result.
        sharding_of: (our name, shape) -> placement of the tensor; default: the first device.

    Raises:
        WeightsError: no safetensors, or tensors missing, unexpected or mis-shaped; all of them are named.
    """
    by_file_name = {file_name(name): (name, shape) for name, shape in shapes.items()}
    stored = _without_spare(folder, by_file_name.keys(), _stored_tensors(Path(folder), by_file_name.keys()))
    _check(folder, by_file_name, stored)
    sharding_of = sharding_of or (lambda name, shape: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    placed = {}
    for key, where in stored.items():  # in file order: sequential reads are faster
        name, wanted = by_file_name[key]
        placed[name] = _place(name, wanted, *where[:3], sharding_of(name, wanted.shape))
    return {name: placed[name] for name in shapes}


def _stored_tensors(folder: Path, wanted: Collection[str]) -> dict[str, Stored]:
    """Today's tensor name -> (file, name in the file, shape, dtype) of everything in the folder's weight files."""
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "numpy") as tensors:
                for key in tensors.offset_keys():
                    if not key.endswith(_IGNORED):
                        about = tensors.get_slice(key)
                        found[_todays_name(key, wanted)] = (path, key, tuple(about.get_shape()), about.get_dtype())
        except SafetensorError as error:
            raise WeightsError(
                f"{path}: not a readable safetensors file ({error}). Download or export it again."
            ) from error
    return found


def _without_spare(
    folder: str | os.PathLike, wanted: Collection[str], stored: Mapping[str, Stored]
) -> dict[str, Stored]:
    """`stored` without tensors that a text encoder's config leaves out: its projection, and layers after the last one
    that is read (clip skip, as diffusers does it). One line says so."""
    spare = [name for name in stored.keys() - set(wanted) if _SPARE.match(name)]
    spare = [n for n in spare if n.startswith("text_projection") or not _layers(wanted) or _layer(n) >= _layers(wanted)]
    if spare:
        layers = sorted({_layer(name) for name in spare if "layers" in name})
        parts = [f"layers {', '.join(map(str, layers))}"] * bool(layers)
        parts += ["text_projection"] * any(name.startswith("text_projection") for name in spare)
        logging.warning("%s: ignored, the config does not read them: %s", folder, " and ".join(parts))
    return {name: where for name, where in stored.items() if name not in spare}


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _layers(wanted: Collection[str]) -> int:
    """Number of layers of a text encoder's tower, from its tensors' names."""
    return len({_layer(name) for name in wanted if name.startswith("text_model.encoder.layers.")})


def _todays_name(key: str, wanted: Collection[str]) -> str:
    candidates = (re.sub(old, new, key) for old, new in _ALIASES)
    return key if key in wanted else next((name for name in candidates if name in wanted), key)


def _check(
    folder: str | os.PathLike, wanted: Mapping[str, tuple[str, jax.ShapeDtypeStruct]], stored: Mapping[str, Stored]
) -> None:
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"unexpected: {name}" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        ours, shape = wanted[name]
        expected = tuple(shape.shape[axis] for axis in to_file_axes(ours, len(shape.shape)))
        if _without_trailing_ones(stored[name][2], len(expected)) != expected:
            problems.append(f"mis-shaped: {name} is {stored[name][2]}, config.json asks for {expected}")
        if stored[name][3] not in _FLOATS:
            problems.append(f"not floating: {name} is {stored[name][3]}; quantised weights are not read")
    if problems:
        raise WeightsError(f"{folder}: {len(problems)} tensors do not fit the config:\n  " + "\n  ".join(problems))


def _without_trailing_ones(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Old autoencoders store the attention's linear layers as 1x1 convolutions, [out, in, 1, 1]."""
    return shape[:ndim] if set(shape[ndim:]) == {1} else shape


def _place(
    name: str,
    wanted: jax.ShapeDtypeStruct,
    path: Path,
    key: str,
    stored_shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> Array:
    axes = to_file_axes(name, len(wanted.shape))
    extra = (0,) * (len(stored_shape) - len(axes))  # see _without_trailing_ones

    @functools.cache  # replicas on this host share one read
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], wanted.dtype)
        in_file = out.transpose(axes)
        # The file is mapped for this tensor alone: pages touched earlier do not stay in our memory.
        with safe_open(path, "numpy") as tensors:
            if not axes:
                out[...] = tensors.get_tensor(key)
                return _finite(out, name, path)
            stored = tensors.get_slice(key)
            (start, stop), *rest = (bounds[axis] for axis in axes)
            for row in range(start, stop, _ROWS):
                rows = slice(row, min(row + _ROWS, stop))
                in_file[rows.start - start : rows.stop - start] = stored[(rows, *(slice(*r) for r in rest), *extra)]
        return _finite(out, name, path)

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(s.indices(size)[:2] for s, size in zip(index, wanted.shape, strict=True)))

    return jax.make_array_from_callback(wanted.shape, sharding, callback)


def _finite(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """`array`; raises WeightsError if it holds infinite or undefined numbers."""
    if not np.isfinite(array).all():
        raise WeightsError(f"{path}: {file_name(name)} holds numbers that are not finite. Download or train it again.")
    return array


def save_model(
    folder: str | os.PathLike, params: Tensors, config: Mapping[str, Any], *, dtype: DTypeLike | None = None, file: str
) -> None:
    """Writes config.json and one safetensors file that diffusers or transformers opens: the inverse of `read_model`.

    Args:
        folder: made if absent.
        params: our names -> arrays, addressable from this process.
        config: the model's config.json as it was read.
        dtype: stored precision; default: as the arrays are.
        file: one of `weight_files.WEIGHT_FILES`, or a variant of it (`weight_files.variant_of`).
    """
    save_tensors(Path(folder) / file, params, dtype=dtype)
    write_atomic(Path(folder) / "config.json", (json.dumps(dict(config), indent=2) + "\n").encode())


def save_tensors(path: str | os.PathLike, params: Tensors, *, dtype: DTypeLike | None = None) -> None:
    """Writes one safetensors file, named and laid out as PyTorch has it; a file that is there stays until it is whole.

    Args:
        path: its folder is made if absent.
        params, dtype: see `save_model`.

    Raises:
        WeightsError: see `as_stored`.
    """
    path = Path(path)
    tensors = {}
    for name, value in params.items():
        array = np.asarray(value)
        axes = to_file_axes(name, array.ndim)
        tensors[file_name(name)] = as_stored(name, array.transpose(axes), dtype or array.dtype)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
