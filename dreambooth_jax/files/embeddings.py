"""Textual inversion files: the rows of new tokens. One name table for all tools.

| key | tensors | tools |
|---|---|---|
| `emb_params` [n, D] | SD 1.x, SD 2.x | kohya, A1111, ComfyUI, InvokeAI; diffusers with `token=` |
| `clip_l` [n, 768], `clip_g` [n, 1280] | SDXL | A1111, ComfyUI, InvokeAI |
| the token itself [n, D] or [D] | SD 1.x, SD 2.x (read only) | diffusers (`learned_embeds.safetensors`) |
"""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from dreambooth_jax.files.layouts import check_path
from dreambooth_jax.files.stream import as_tensor, write_tensors
from dreambooth_jax.files.weight_files import WeightsError

ONE = "emb_params"
SEVERAL = ("clip_l", "clip_g")  # in the order of the model's text encoders


def write_embeddings(
    path: str | os.PathLike,
    rows: Sequence[jax.Array | np.ndarray],
    *,
    dtype: DTypeLike = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the rows of new tokens, [n, D] for each text encoder; the file's name is the word in A1111 and ComfyUI.

    Raises:
        ValueError: these files have names for one text encoder, or for two.
    """
    if len(rows) > len(SEVERAL):
        raise ValueError(
            f"{path}: embedding files have names for at most {len(SEVERAL)} text encoders, not {len(rows)}"
        )
    keys = (ONE,) if len(rows) == 1 else SEVERAL
    tensors = {key: as_tensor(value) for key, value in zip(keys, rows, strict=True)}
    write_tensors(path, tensors, dtype=dtype, metadata=metadata)


def read_embeddings(path: str | os.PathLike, widths: Sequence[int]) -> list[np.ndarray]:
    """The rows [n, D] for each text encoder, float32.

    Args:
        path: a safetensors file of any tool.
        widths: D of the model's text encoders.

    Raises:
        WeightsError: a pickle (with the command that converts it), no such tensors, or rows of another width.
    """
    path = check_path(path)
    try:
        with safe_open(path, "numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    if tensors.keys() >= set(SEVERAL):
        found = [tensors[key] for key in SEVERAL]
    elif len(tensors) == 1:
        found = list(tensors.values())
    else:
        raise WeightsError(
            f"{path}: expected {ONE}, {' and '.join(SEVERAL)}, or one token; it has {', '.join(tensors)}"
        )
    found = [np.atleast_2d(np.asarray(value, np.float32)) for value in found]
    if [value.shape[1:] for value in found] != [(width,) for width in widths]:
        have = ", ".join(str(value.shape[-1]) for value in found)
        raise WeightsError(
            f"{path}: rows of width {have}, but this base's text encoders have {', '.join(map(str, widths))}"
        )
    return found
