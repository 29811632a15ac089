"""LoRA files with kohya's names: `lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight`, `.lora_up.weight`, `.alpha`.

ComfyUI, A1111, Forge, InvokeAI, Draw Things, kohya's scripts and diffusers read them. LyCORIS's factors have names of
their own.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dreambooth_jax.adapters.factors import INPUT_MAGNITUDE, MAGNITUDE, by_module, rank_of
from dreambooth_jax.files.ldm_names import unet_names
from dreambooth_jax.files.single_file import SD1, SD2, XL, model_spec
from dreambooth_jax.files.stream import as_tensor, write_tensors
from dreambooth_jax.models.params import Tensors

# Part -> prefix in files of a model with one text encoder, and in files of a model with several.
PREFIXES = {
    "unet": ("lora_unet_", "lora_unet_"),
    "transformer": ("lora_transformer_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te2_"),
    "text_encoder_3": ("lora_te3_", "lora_te3_"),
}
_VERSIONS = {SD1: "sd_v1", SD2: "sd_v2", XL: "sdxl_base_v1-0"}


class About(NamedTuple):
    """What an adapter file says of itself.

    Attributes:
        layout: kind of base, of single_file.layout_of.
        title: name of the adapter.
        trigger: words in a prompt that call the subject.
        settings: `ss_` fields of training, without the prefix: "learning_rate", "steps", "seed", ...
    """

    layout: str
    v_prediction: bool
    title: str
    trigger: str
    base: str
    settings: Mapping[str, Any]


def head_of(module: str, several: bool) -> str:
    """What a file calls our module, without the tensor's own name.

    Args:
        several: whether the model has several text encoders.
    """
    part, _, inner = module.partition(".")
    return PREFIXES[part][several] + inner.replace(".", "_")


def heads(modules: Iterable[str]) -> dict[str, str]:
    """Every head by which files call the `modules`, our names: diffusers' names and, for the UNet, LDM's."""
    found: dict[str, str] = {}
    names = list(modules)
    for module in names:
        part, _, inner = module.partition(".")
        for prefix in (*PREFIXES.get(part, ()), "lycoris_"):
            found.setdefault(prefix + inner.replace(".", "_"), module)
    of_unet = [module.removeprefix("unet.") for module in names if module.startswith("unet.")]
    rename = unet_names(of_unet)
    return found | {f"lora_unet_{rename(name).replace('.', '_')}": f"unet.{name}" for name in of_unet}


def to_file(factors: Tensors, several: bool) -> dict[str, np.ndarray]:
    """Key -> tensor of the file, for factors that have their scale multiplied in: alpha is the rank."""
    tensors: dict[str, np.ndarray] = {}
    for module, named in by_module(factors).items():
        head, rank = head_of(module, several), rank_of(named)
        for name, value in named.items():
            tensors |= {f"{head}.{leaf}": x for leaf, x in _leaf(name, np.asarray(value)).items()}
        window = next((x.ndim for k, x in tensors.items() if k == f"{head}.lora_down.weight"), 2)
        for magnitude in (MAGNITUDE, INPUT_MAGNITUDE):
            if f"{magnitude}.scale" in named:
                shape = [1] * window
                shape[magnitude == INPUT_MAGNITUDE] = -1
                tensors[f"{head}.dora_scale"] = np.asarray(named[f"{magnitude}.scale"]).reshape(shape)
        if not {name.partition(".")[0] for name in named} <= {"diff"}:
            tensors[f"{head}.alpha"] = np.asarray(float(rank))
    return tensors


def _leaf(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The file's tensors of one factor, but for DoRA's magnitude."""
    if name == "lora_A.kernel":
        return {"lora_down.weight": value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)}
    if name == "diff.kernel":
        return {"diff": value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)}
    if name == "lora_B.kernel":
        return {"lora_up.weight": value.T}
    plain = {"diff.bias": "diff_b", "diff.scale": "w_norm", "diff.embedding": "diff"}
    if name in plain:
        return {plain[name]: value}
    return {name.removesuffix(".weight"): value} if name.endswith(".weight") else {}


def write_kohya(path: str | os.PathLike, factors: Tensors, about: About, *, dtype: DTypeLike) -> None:
    """Writes one file for all tools.

    Args:
        path: its name without suffix is the adapter's name in prompts of A1111.
        factors: `MODULE.FACTOR.LEAF`, scale multiplied in (`Method.adapter`).
        dtype: stored precision: float32, float16 or bfloat16.

    Raises:
        ValueError: the model's parts have no name in these files.
    """
    unknown = {module.partition(".")[0] for module in by_module(factors)} - PREFIXES.keys()
    if unknown:
        raise ValueError(f"{path}: kohya's files have no name for {', '.join(sorted(unknown))}; write a PEFT file")
    tensors = to_file(factors, about.layout == XL)
    for key, value in tensors.items():  # a convolution's second factor is a 1x1 convolution
        if key.endswith(".lora_up.weight") and tensors[key.replace("_up.", "_down.")].ndim == 4:
            tensors[key] = value[..., None, None]
    tensors = {key: np.asarray(value, jnp.dtype(dtype), order="C") for key, value in sorted(tensors.items())}
    digest = hashlib.sha256(b"".join(value.tobytes() for value in tensors.values())).hexdigest()
    metadata = (
        {"format": "pt"}
        | _metadata(tensors, about)
        | {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    )
    write_tensors(path, {key: as_tensor(value) for key, value in tensors.items()}, dtype=dtype, metadata=metadata)


def _metadata(tensors: Mapping[str, np.ndarray], about: About) -> dict[str, str]:
    ranks = [int(value) for key, value in tensors.items() if key.endswith(".alpha")]
    lycoris = next((form for form, mark in (("loha", ".hada_"), ("lokr", ".lokr_")) if mark in "".join(tensors)), "")
    rank = str(max(ranks, default=0))
    own = {
        "v2": about.layout == SD2,
        "base_model_version": _VERSIONS[about.layout] + ("_v" if about.v_prediction else ""),
        "network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "network_dim": rank,
        "network_alpha": rank,
        "network_args": json.dumps(
            {"algo": "loha" if any(".hada_" in key for key in tensors) else "lokr"} if lycoris else {}
        ),
        "output_name": about.title,
        "sd_model_name": about.base,
    }
    stated = {f"ss_{name}": str(value) for name, value in {**about.settings, **own}.items()}
    return stated | model_spec(
        about.layout, v_prediction=about.v_prediction, title=about.title, trigger=about.trigger, kind="/lora"
    )
