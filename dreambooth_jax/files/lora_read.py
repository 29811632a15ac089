"""Adapter files of any tool, read as the factors that layers and `factors.add` take: the scale multiplied in.

A key is a head, the module, and a leaf, the tensor; heads are found in tables made from the model's own names, because
the underscores of kohya's names cannot be divided without it.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dreambooth_jax.adapters.factors import FORMS, INPUT_MAGNITUDE, MAGNITUDE, add, difference, merge, rank_of
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.layouts import check_path, split_weight
from dreambooth_jax.files.ldm_names import unet_names
from dreambooth_jax.files.lora_kohya import heads
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.models.params import Tensors, under_prefix

# Names of older diffusers -> PEFT's. The output projection has lost its ".0" there.
_OLDER = (
    (r"\.processor\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora_\1.weight"),
    (r"\.processor\.(to_[qkv])_lora\.(down|up)\.weight$", r".\1.lora_\2.weight"),
    (r"\.self_attn\.to_([qkv]|out)_lora\.(down|up)\.weight$", r".self_attn.\1_proj.lora_\2.weight"),
    (r"\.lora_linear_layer\.(down|up)\.weight$", r".lora_\1.weight"),
    (r"\.lora\.(down|up)\.weight$", r".lora_\1.weight"),
    (r"^base_model\.model\.", ""),
)
_LEAF = re.compile(
    r"\.(lora_down\.weight|lora_up\.weight|lora_mid\.weight|lora_A\.weight|lora_B\.weight|alpha|dora_scale|"
    r"lora_magnitude_vector(?:\.weight)?|hada_\w+|lokr_\w+|diff|diff_b|w_norm|b_norm)$"
)
Alpha = Callable[[int], float]  # rank -> alpha
# What arrays of other shapes than a module's raise where they are combined.
_DO_NOT_FIT = (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError)
_PEFT_LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def read_adapter(
    path: str | os.PathLike, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(factors `MODULE.FACTOR.LEAF`, float32, scale multiplied in; the file's metadata).

    Args:
        path: LoRA, LoCon, DoRA, LoHa, LoKr or full differences, with the names of kohya, PEFT or older diffusers.
        shapes: parameters of the model that the adapter is for.

    Raises:
        WeightsError: a pickle, no safetensors file, or tensors that this model has no place for; all of them are named.
    """
    path = check_path(path)
    try:
        with safe_open(path, "numpy") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    return from_file(tensors, metadata, shapes, str(path)), metadata


def from_file(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    path: str = "the file",
) -> dict[str, np.ndarray]:
    """The factors of a file's tensors; see `read_adapter`."""
    modules = {name.rpartition(".")[0]: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    tables = {name.rpartition(".")[0] for name in shapes if name.endswith(".embedding")}
    table, unknown = _heads(modules), []
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        renamed = key
        for old, new in _OLDER:
            renamed = re.sub(old, new, renamed)
        leaf = _LEAF.search(renamed)
        module = leaf and table.get(renamed[: leaf.start()])
        if module:
            name = _PEFT_LEAVES.get(leaf[1], leaf[1].removesuffix(".weight") if "magnitude" in leaf[1] else leaf[1])
            found.setdefault(module, {})[name] = np.asarray(value, np.float32)
        else:
            unknown.append(key)
    if unknown or not found:
        raise WeightsError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors have no place in this model, a file of another "
            f"architecture or format: {', '.join(sorted(unknown)[:5])}"
        )
    alphas = _peft_alphas(metadata, path)
    factors: dict[str, np.ndarray] = {}
    for module, leaves in found.items():
        shape, alpha = tuple(modules[module].shape), alphas(module)
        try:  # rows are rows in files too
            own = {"diff.embedding": leaves["diff"].reshape(shape)} if module in tables else {}
            own = own or _factors(leaves, shape, alpha)
            _check_fits(own, module, shapes)
        except _DO_NOT_FIT as error:
            raise WeightsError(f"{path}: the tensors of {module} do not fit its {shape}: {error!r}") from error
        factors |= {f"{module}.{name}": value for name, value in own.items()}
    return factors


def _check_fits(own: dict[str, np.ndarray], module: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError, or what `_DO_NOT_FIT` lists, if factors make no difference to parameters of the module."""
    plain = {name: x for name, x in own.items() if name in ("diff.bias", "diff.scale", "diff.embedding")}
    made = {name.partition(".")[2]: x.shape for name, x in plain.items()}
    others = {name: x for name, x in own.items() if name not in plain}
    if others and "diff.kernel" not in own and not {"lora_A.kernel", "lora_B.kernel"} <= own.keys():
        made["kernel"] = jax.eval_shape(difference, shapes[f"{module}.kernel"], others).shape
    wrong = {leaf: shape for leaf, shape in made.items() if shape != shapes[f"{module}.{leaf}"].shape}
    if wrong:
        raise ValueError(f"differences of other shapes: {wrong}")


def _heads(modules: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, str]:
    """Head in any kind of file -> our module."""
    found = heads(modules)
    inner = under_prefix("unet.", modules)
    rename = unet_names(inner)
    found |= {f"diffusion_model.{rename(name)}": f"unet.{name}" for name in inner}
    found |= {name: f"unet.{name}" for name in inner}
    return found | {module: module for module in modules}


def _peft_alphas(metadata: Mapping[str, str], path: str) -> Callable[[str], Alpha | None]:
    """module -> alpha by which PEFT's metadata scales it, a function of the rank; None without metadata.

    Raises:
        WeightsError: the metadata are no JSON object; in the function, alphas that are no numbers.
    """
    try:
        stated = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise WeightsError(f"{path}: its lora_adapter_metadata are not JSON: {error}") from error
    if not isinstance(stated, dict):
        raise WeightsError(f"{path}: its lora_adapter_metadata are no JSON object but {stated!r}")

    def alpha_of(module: str) -> Alpha | None:
        part, _, inner = module.partition(".")
        alpha = stated.get(f"{part}.lora_alpha")
        if alpha is None:
            return None
        patterns = stated.get(f"{part}.alpha_pattern") or {}
        try:
            own = next((v for pattern, v in patterns.items() if re.search(rf"(^|\.){pattern}$", inner)), alpha)
            own = float(own)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise WeightsError(
                f"{path}: its lora_adapter_metadata name no alphas of {part}: {alpha!r}, {patterns!r}"
            ) from error
        return lambda rank: own * rank**0.5 if stated.get(f"{part}.use_rslora") else own

    return alpha_of


def _factors(leaves: dict[str, np.ndarray], kernel: tuple[int, ...], peft_alpha: Alpha | None) -> dict[str, np.ndarray]:
    """The factors of one module, in our layout.

    Raises:
        ValueError, KeyError: they do not make a difference of the kernel's shape.
    """
    *window, rows, columns = kernel if len(kernel) > 1 else (1, *kernel)
    own: dict[str, np.ndarray] = {}
    for leaf, name in (("diff_b", "diff.bias"), ("b_norm", "diff.bias"), ("w_norm", "diff.scale")):
        if leaf in leaves:
            own[name] = leaves[leaf].reshape(columns)
    if "diff" in leaves:
        own["diff.kernel"] = _ours(leaves["diff"], (*window, rows, columns)).reshape(kernel)
    if "lora_down.weight" in leaves:
        down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
        if "lora_mid.weight" in leaves:  # Tucker: the window is in the middle
            down = np.einsum("pqhw,qi->pihw", leaves["lora_mid.weight"], down.reshape(down.shape[0], -1))
        rank = up.shape[1]
        own["lora_A.kernel"] = _ours(down, (*window, rows, rank))
        own["lora_B.kernel"] = up.reshape(columns, rank).T
    own |= {f"{leaf}.weight": x for leaf, x in leaves.items() if leaf.startswith(("hada_", "lokr_"))}
    magnitude = next((leaves[leaf] for leaf in ("dora_scale", "lora_magnitude_vector") if leaf in leaves), None)
    if magnitude is not None:
        per_input = "dora_scale" in leaves and magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
        name, size = (INPUT_MAGNITUDE, rows) if per_input else (MAGNITUDE, columns)
        own[f"{name}.scale"] = magnitude.reshape(size)
    return _scaled(own, leaves.get("alpha"), peft_alpha)


def _scaled(own: dict[str, np.ndarray], alpha: np.ndarray | None, peft_alpha: Alpha | None) -> dict[str, np.ndarray]:
    rank = rank_of(own)
    stated = float(alpha) if alpha is not None else peft_alpha(rank) if peft_alpha else float(rank)
    factored = {name.partition(".")[0] for name in own}
    if {"lokr_w1", "lokr_w2"} <= factored:
        return own  # nothing is factored: there is no rank, and alpha has no meaning
    carrying = {f"{form.scaled}{end}" for form in FORMS.values() for end in (".kernel", ".weight", "_a.weight")}
    return {name: value * (stated / rank) if name in carrying else value for name, value in own.items()}


def _ours(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor [out, in, h, w] of a file as a kernel of `shape` [h, w, in, out] or [in, out]."""
    *window, rows, columns = shape
    if value.ndim == 2 or set(value.shape[2:]) == {1}:
        return value.reshape(columns, rows).T.reshape(shape)
    return value.reshape(columns, rows, *window).transpose(2, 3, 1, 0)


def read_adapters(
    files: Sequence[str], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> list[tuple[dict[str, np.ndarray], float]]:
    """(factors, weight) of each "FILE" or "FILE:WEIGHT"; the weight is 1 by default.

    Args:
        shapes: the model's parameters.

    Raises:
        WeightsError: see `read_adapter`.
    """
    return [(read_adapter(path, shapes)[0], weight) for path, weight in map(split_weight, files)]


def with_adapters(params: Tensors, adapters: Sequence[tuple[Tensors, float]]) -> Tensors:
    """`params` with adapters merged into their kernels at their weights; weight 0 leaves the base exactly.

    Args:
        params: of a model; factors among them are merged first.
        adapters: see `read_adapters`.
    """
    if not adapters:
        return params
    whole = merge(params)
    base = dict(whole)
    for factors, weight in adapters:
        changed = add(base, factors)
        for name in changed:
            if changed[name] is not base[name]:
                whole[name] = whole[name] + weight * (changed[name] - base[name])
    return whole
