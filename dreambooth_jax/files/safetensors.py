"""Safetensors files to flat params and back, in the layouts of diffusers and transformers.

One rule covers every tensor: the last part of the name becomes `weight`, and kernels are transposed. The few true
exceptions stand in `_ALIASES` and `_IGNORED`. Each tensor is read once and only the slices that this host's devices
hold, so peak host memory is the placed parameters plus one tensor.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreambooth_jax.models.params import Params

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")

# What a file may call a tensor -> what it is called today. Autoencoders saved before diffusers 0.16 name their
# attention differently; transformers 5 leaves out the wrapper of the text model. Applied only where today's name is
# wanted.
_ALIASES = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),
)
_ROWS = 16  # a cache line: transposing in strips is three times as fast as all at once
# A constant buffer of older transformers; a head that features are not read from.
_IGNORED = ("encoder.embed_tokens.weight", "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


class WeightsError(ValueError):
    """Weights are absent, in a refused format, or do not fit the model."""


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
        shapes: our name -> shape and dtype wanted.
        sharding_of: (our name, shape) -> where the tensor goes; default: the first device.

    Raises:
        WeightsError: no safetensors there, or tensors missing, unexpected or mis-shaped; all of them are named.
    """
    by_file_name = {file_name(name): (name, shape) for name, shape in shapes.items()}
    stored = _stored_tensors(Path(folder), by_file_name.keys())
    _check(folder, by_file_name, stored)
    sharding_of = sharding_of or (lambda name, shape: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    placed = {}
    for key, where in stored.items():  # in the order of the file: disks read on
        name, wanted = by_file_name[key]
        placed[name] = _place(name, wanted, *where, sharding_of(name, wanted.shape))
    return {name: placed[name] for name in shapes}


def _stored_tensors(folder: Path, wanted: Collection[str]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Today's tensor name -> (file, name in the file, shape) of everything in the folder's weight files."""
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "numpy") as tensors:
                for key in tensors.offset_keys():
                    if not key.endswith(_IGNORED):
                        found[_todays_name(key, wanted)] = (path, key, tuple(tensors.get_slice(key).get_shape()))
        except SafetensorError as error:
            raise WeightsError(
                f"{path}: not a readable safetensors file ({error}). Download or export it again."
            ) from error
    return found


def _todays_name(key: str, wanted: Collection[str]) -> str:
    candidates = (re.sub(old, new, key) for old, new in _ALIASES)
    return key if key in wanted else next((name for name in candidates if name in wanted), key)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or an index's shards. Raises WeightsError if there are none."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: no such folder. A base is a diffusers folder with unet/, vae/ and text_encoder/."
        )
    sets = {}  # a single file, or an index with its shards; variants such as fp16 are sets of their own
    for index in folder.glob("*.safetensors.index*.json"):
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightsError(f"{index} names shards that are not there: {', '.join(absent)}")
        sets[index.name] = [folder / name for name in names]
    shards = {path for paths in sets.values() for path in paths}
    sets |= {path.name: [path] for path in folder.glob("*.safetensors") if path not in shards}
    plain = [name for stem in WEIGHT_FILES for name in (stem, f"{stem}.index.json") if name in sets]
    if plain or len(sets) == 1:
        return sets[plain[0] if plain else next(iter(sets))]
    if sets:
        raise WeightsError(
            f"{folder}: several weight files, {', '.join(sorted(sets))}, and none with a plain name, "
            f"{' or '.join(WEIGHT_FILES)}. Keep or rename the one to read."
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickles:
        base = folder.parent
        raise WeightsError(
            f"{folder}: only pickled weights ({', '.join(pickles)}), which can run code when opened and are refused. "
            "Convert the folder once, where PyTorch is installed:\n"
            '  python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_pretrained('{base}').save_pretrained('{base}-safetensors')\""
        )
    raise WeightsError(f"{folder}: no weights. Expected {' or '.join(WEIGHT_FILES)}.")


def _check(folder, wanted: Mapping[str, tuple[str, jax.ShapeDtypeStruct]], stored: Mapping[str, tuple]) -> None:
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"unexpected: {name}" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        ours, shape = wanted[name]
        expected = tuple(shape.shape[axis] for axis in to_file_axes(ours, len(shape.shape)))
        if _without_trailing_ones(stored[name][2], len(expected)) != expected:
            problems.append(f"mis-shaped: {name} is {stored[name][2]}, config.json asks for {expected}")
    if problems:
        raise WeightsError(f"{folder}: {len(problems)} tensors do not fit the config:\n  " + "\n  ".join(problems))


def _without_trailing_ones(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Old autoencoders store the attention's linear layers as 1x1 convolutions, [out, in, 1, 1]."""
    return shape[:ndim] if set(shape[ndim:]) == {1} else shape


def _place(name, wanted: jax.ShapeDtypeStruct, path: Path, key: str, stored_shape, sharding) -> Array:
    axes = to_file_axes(name, len(wanted.shape))
    extra = (0,) * (len(stored_shape) - len(axes))  # see _without_trailing_ones

    @functools.cache  # replicas on this host share one read
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], wanted.dtype)
        in_file = out.transpose(axes)
        # The file is mapped for this tensor alone: pages touched earlier do not stay in our memory.
        with safe_open(path, "numpy") as tensors:
            if not axes:
                return tensors.get_tensor(key).astype(wanted.dtype)
            stored = tensors.get_slice(key)
            (start, stop), *rest = (bounds[axis] for axis in axes)
            for row in range(start, stop, _ROWS):
                rows = slice(row, min(row + _ROWS, stop))
                in_file[rows.start - start : rows.stop - start] = stored[(rows, *(slice(*r) for r in rest), *extra)]
        return out

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(s.indices(size)[:2] for s, size in zip(index, wanted.shape, strict=True)))

    return jax.make_array_from_callback(wanted.shape, sharding, callback)


def save_model(
    folder: str | os.PathLike, params: Mapping[str, Array], config: Mapping, *, dtype=None, stem: str
) -> None:
    """Writes config.json and one safetensors file that diffusers or transformers opens: the inverse of `read_model`.

    Args:
        folder: made if absent.
        params: our names -> arrays, addressable from this process.
        config: the model's config.json as it was read.
        dtype: stored precision; default: as the arrays are.
        stem: one of `WEIGHT_FILES`.
    """
    save_tensors(Path(folder) / stem, params, dtype=dtype)
    (Path(folder) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def save_tensors(path: str | os.PathLike, params: Mapping[str, Array], *, dtype=None) -> None:
    """Writes one safetensors file, named and laid out as PyTorch has it; a file that is there stays until it is whole.

    Args:
        path: its folder is made if absent.
        params, dtype: see `save_model`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in params.items():
        array = np.asarray(value)
        axes = to_file_axes(name, array.ndim)
        tensors[file_name(name)] = np.array(array.transpose(axes), dtype=dtype or array.dtype, order="C")
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(mode)  # safetensors makes files that only their owner reads
    os.replace(partial, path)
