"""LDM single files: one safetensors file with denoiser, autoencoder and text encoders.

A1111, ComfyUI, kohya's scripts and Civitai have SD 1.x, SD 2.x and SDXL in this form.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from dreambooth_jax.files.layouts import SD1, SD2, UNET, XL, check_path
from dreambooth_jax.files.ldm_names import open_clip_name, unet_names, vae_names
from dreambooth_jax.files.safetensors import file_name, to_file_axes
from dreambooth_jax.files.sd2_config import V_YAML
from dreambooth_jax.files.stream import Tensor, write_tensors
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.models.params import Params, Shape, Shapes, Tensors, under_prefix

VAE = "first_stage_model."
# Layout -> text part -> (prefix in the file, whether the names are open_clip's).
_TEXT = {
    SD1: {"text_encoder": ("cond_stage_model.transformer.", False)},
    SD2: {"text_encoder": ("cond_stage_model.model.", True)},
    XL: {
        "text_encoder": ("conditioner.embedders.0.transformer.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    },
}
_SGM = (("conditioner.embedders.0.", "cond_stage_model."),)  # the one text encoder's name in newer code
_QKV = re.compile(r"^(.*)\.self_attn\.[qkv]_proj\.(kernel|bias)$")
# Keys of many files that no model reads: constants of the schedule, averages, the optimizer; a head of CLIP; markers.
_IGNORED = re.compile(
    r"^(betas|alphas_|sqrt_|log_one|posterior_|model_ema\.|optimizer|lr_sched|v_pred$|ztsnr$|denoiser\.|edm_|cond_stage"
    r"_model\.model\.(visual|logit_scale|text_projection|attn_mask)|conditioner\.embedders\.\d\.(model\.)?(logit_scale|"
    r"visual|attn_mask)|first_stage_model\.(loss|model_ema))|position_ids$"
)


class Entry(NamedTuple):
    """A tensor of the file: the names of our tensors in it (three for a fused q, k, v), and its layout.

    Attributes:
        convolution: whether the file has a linear layer as a 1x1 convolution, [out, in, 1, 1].
        plain: whether the tensor has our axes, not PyTorch's.
    """

    names: tuple[str, ...]
    convolution: bool = False
    plain: bool = False


def layout_of(shapes: Iterable[str], configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The layout of a base's single file.

    Args:
        shapes: all parameters' names.
        configs: part -> config.json.

    Raises:
        ValueError: the parts are those of no layout.
    """
    parts = {name.partition(".")[0] for name in shapes}
    if parts == {"unet", "vae", "text_encoder", "text_encoder_2"}:
        return XL
    if parts == {"unet", "vae", "text_encoder"}:
        return SD2 if configs["text_encoder"].get("hidden_act") == "gelu" else SD1
    raise ValueError(f"single files hold SD 1.x, SD 2.x or SDXL, not {', '.join(sorted(parts))}; write a folder")


def entries(shapes: Mapping[str, Shape], layout: str) -> dict[str, Entry]:
    """Key in the file -> our tensors, for every parameter of `shapes`: the one table that reading and writing share."""
    table: dict[str, Entry] = {}
    unet, vae = (under_prefix(f"{part}.", shapes) for part in ("unet", "vae"))
    rename = unet_names(unet)
    table |= {UNET + file_name(rename(name)): Entry((f"unet.{name}",)) for name in unet}
    rename = vae_names(vae)
    for name, value in vae.items():
        attention = ".attentions." in name and len(value.shape) == 2
        table[VAE + file_name(rename(name))] = Entry((f"vae.{name}",), convolution=attention)
    for part, (prefix, open_clip) in _TEXT[layout].items():
        names = under_prefix(f"{part}.", shapes)
        table |= (
            _open_clip_entries(part, prefix, names)
            if open_clip
            else {prefix + file_name(name): Entry((f"{part}.{name}",)) for name in names}
        )
    return table


def _open_clip_entries(part: str, prefix: str, names: Mapping[str, Shape]) -> dict[str, Entry]:
    table: dict[str, Entry] = {}
    for name in names:
        if found := _QKV.match(name):
            layer, leaf = found.groups()
            key = f"{open_clip_name(layer)}.attn.in_proj_{'weight' if leaf == 'kernel' else 'bias'}"
            table[prefix + key] = Entry(tuple(f"{part}.{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv"))
        elif name.startswith("text_projection."):
            table[f"{prefix}text_projection"] = Entry((f"{part}.{name}",), plain=True)
        else:
            key = open_clip_name(name)
            table[prefix + (key if key == "positional_embedding" else file_name(key))] = Entry((f"{part}.{name}",))
    return table


def shape_in_file(entry: Entry, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    parts = [tuple(shapes[name].shape) for name in entry.names]
    axes = range(len(parts[0])) if entry.plain else to_file_axes(entry.names[0], len(parts[0]))
    first, *rest = (parts[0][axis] for axis in axes)
    return (first * len(parts), *rest, *((1, 1) if entry.convolution else ()))


def _to_file(entry: Entry, params: Tensors) -> np.ndarray:
    arrays = [np.asarray(params[name]) for name in entry.names]
    if not entry.plain:
        arrays = [x.transpose(to_file_axes(name, x.ndim)) for name, x in zip(entry.names, arrays, strict=True)]
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return whole[..., None, None] if entry.convolution else whole


def _from_file(entry: Entry, value: np.ndarray, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    found = {}
    for name, part in zip(entry.names, np.split(value, len(entry.names)), strict=True):
        shape = shapes[name].shape
        if not entry.plain:
            part = part.reshape(part.shape[: len(shape)])  # 1x1 convolutions stand for linear layers and vice versa
            part = part.transpose(np.argsort(to_file_axes(name, part.ndim)))
        found[name] = part
    return found


def write_single_file(
    path: str | os.PathLike, params: Tensors, layout: str, *, dtype: DTypeLike, metadata: Mapping[str, str]
) -> None:
    """Writes all parameters of a base as one file, tensor by tensor.

    Args:
        params: our names -> arrays of all parts.
        layout: see `layout_of`.
        dtype: stored precision: float32, float16 or bfloat16.
        metadata: text entries of the header, such as `describe` returns.
    """
    tensors = {
        key: Tensor(shape_in_file(entry, params), lambda entry=entry: _to_file(entry, params))
        for key, entry in entries(params, layout).items()
    }
    write_tensors(path, tensors, dtype=dtype, metadata=metadata)


def read_single_file(
    path: str | os.PathLike,
    shapes: Shapes,
    layout: str,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Params:
    """Reads a single file as the parameters `shapes`, in their dtypes.

    Args:
        path: a .safetensors file.
        sharding_of: (our name, shape) -> placement of the tensor; default: the first device.

    Raises:
        WeightsError: no such file, a pickle, or tensors missing, unexpected or mis-shaped; all of them are named.
    """
    path = check_path(path)
    sharding_of = sharding_of or (lambda name, shape: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    placed: Params = {}
    try:
        with safe_open(path, "numpy") as file:
            stored = {_todays_key(key, layout): key for key in file.offset_keys() if not _IGNORED.search(key)}
            table = entries(shapes, layout)
            _check(path, table, shapes, {k: tuple(file.get_slice(v).get_shape()) for k, v in stored.items()}, layout)
            for key, entry in table.items():
                for name, value in _from_file(entry, file.get_tensor(stored[key]), shapes).items():
                    whole = np.ascontiguousarray(value, shapes[name].dtype)
                    placed[name] = jax.device_put(whole, sharding_of(name, whole.shape))
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}). Download it again.") from error
    return {name: placed[name] for name in shapes}


def _todays_key(key: str, layout: str) -> str:
    """A key in the form of `entries`: older files lack "text_model.", newer code has another name for the text
    encoder."""
    if layout != XL:
        for new, old in _SGM:
            key = old + key.removeprefix(new) if key.startswith(new) else key
    return re.sub(r"(\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)", r"\1text_model.", key)


def _check(path: Path, table: Mapping[str, Entry], shapes: Shapes, stored: Mapping[str, tuple], layout: str) -> None:
    def last(key: str) -> bool:  # SD 2.x conditions on the penultimate layer; original files have the last one too
        depth = [int(found[1]) for key in table if (found := re.search(r"resblocks\.(\d+)\.", key))]
        found = re.match(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.", key)
        return bool(found) and int(found[1]) > max(depth)

    problems = [f"missing: {key}" for key in sorted(table.keys() - stored.keys())]
    extra = stored.keys() - table.keys()
    problems += [f"unexpected: {key}" for key in sorted(extra) if layout != SD2 or not last(key)]
    for key in sorted(table.keys() & stored.keys()):
        expected = shape_in_file(table[key], shapes)
        if _squeezed(stored[key]) != _squeezed(expected):
            problems.append(f"mis-shaped: {key} is {stored[key]}, expected {expected}")
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise WeightsError(f"{path} is no {layout} file of these configs: {len(problems)} tensors differ:\n  {shown}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def predicts_v(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a base of these configs predicts the velocity."""
    return configs["scheduler"].get("prediction_type") == "v_prediction"


def write_yaml(path: Path, layout: str, *, v_prediction: bool) -> list[Path]:
    """Writes the .yaml beside a single file of SD 2.x that predicts the velocity; returns it, or [] for other files."""
    if not (layout == SD2 and v_prediction):
        return []
    path.with_suffix(".yaml").write_text(V_YAML)
    return [path.with_suffix(".yaml")]


def describe(layout: str, *, v_prediction: bool, resolution: int, title: str, trigger: str) -> dict[str, str]:
    """ModelSpec 1.0.1 metadata of a checkpoint."""
    return (
        {"format": "pt"}
        | model_spec(
            layout,
            v_prediction=v_prediction,
            title=title,
            trigger=trigger,
            implementation="https://github.com/Stability-AI/generative-models",
        )
        | {"modelspec.resolution": f"{resolution}x{resolution}"}
    )


def model_spec(
    layout: str, *, v_prediction: bool, title: str, trigger: str, implementation: str = "diffusers", kind: str = ""
) -> dict[str, str]:
    """The ModelSpec fields that checkpoints and adapters share; `kind` is "", "/lora" or "/textual-inversion"."""
    second = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    names = {SD1: "stable-diffusion-v1", SD2: second, XL: "stable-diffusion-xl-v1-base"}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": names[layout] + kind,
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }
