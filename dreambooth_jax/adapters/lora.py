"""LoRA (arXiv 2106.09685, equation 3): the base stays frozen, chosen kernels get a trainable low-rank difference,
W = W0 + (alpha / r) A B, with A [..., in, r] random, B [r, out] zero at the start, and r its rank.

The factors stay factors: beside `MODULE.kernel` the layer finds `MODULE.lora_A.kernel` and `MODULE.lora_B.kernel` and
computes x W0 + (x A) B (models.layers.adapt). `merge` folds them into the kernels where a plain model is wanted.
"""

import re
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dreambooth_jax.adapters.method import Method, Value
from dreambooth_jax.models.layers import column_norms
from dreambooth_jax.models.params import Params, Shapes

A, B, M = ".lora_A.kernel", ".lora_B.kernel", ".lora_magnitude_vector.scale"


def lora(parts: str, targets: str, rank: int, alpha: float, names: str = "") -> Method:
    """Low-rank differences of the kernels of the modules that match both regexes.

    Args:
        parts: regex found in the names of the parameters that may train.
        targets: regex for the end of a module's name, such as r"\\.to_[qkv]".
        rank: r; no larger than the kernel's own is used.
        alpha: numerator of the scale alpha / rank, so that the learning rate need not follow the rank.

    Raises:
        ValueError: from `shapes` and `start`, if no module matches.
    """

    def shapes(params: Shapes) -> tuple[Shapes, Shapes]:
        trainable = {}
        for module, kernel in chosen(params, parts, targets).items():
            *window, rows, columns = kernel.shape
            r = min(rank, rows, columns)
            trainable[module + A] = jax.ShapeDtypeStruct((*window, rows, r), jnp.float32)
            trainable[module + B] = jax.ShapeDtypeStruct((r, columns), jnp.float32)
        return trainable, dict(params)

    def start(params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
        wanted = shapes({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()})[0]
        first = jax.jit(lambda key: {n: _first(n, x.shape, key) for n, x in wanted.items()}, out_shardings=key.sharding)
        return first(key), params

    def combine(frozen: Params, trainable: Params) -> Params:
        return frozen | {n: alpha / rank * x if n.endswith(B) else x for n, x in trainable.items()}

    return Method(shapes, start, combine, f"LoRA of rank {rank} on {names}")


def chosen(params: Mapping[str, Value], parts: str, targets: str) -> dict[str, Value]:
    """Module name -> kernel of the modules that match both regexes.

    Raises:
        ValueError: there are none.
    """
    kernels = {n.removesuffix(".kernel"): v for n, v in params.items() if n.endswith(".kernel") and len(v.shape) > 1}
    found = {n: v for n, v in kernels.items() if re.search(parts, n) and re.search(f"(?:{targets})$", n)}
    if not found:
        some = ", ".join(list(kernels)[:3])
        raise ValueError(f"lora_targets = {targets!r}: no module's name ends like that; there are {some}, ...")
    return found


def modules(params: Mapping[str, Value]) -> list[str]:
    """The modules that have factors."""
    return [name.removesuffix(B) for name in params if name.endswith(B)]


def merge(params: Params) -> Params:
    """The plain parameters of a model that `combine` has given factors: W = W0 + A B, with a magnitude m W / |W|."""
    merged = {name: x for name, x in params.items() if not name.endswith((A, B, M))}
    for module in modules(params):
        kernel, a, b = (params[module + end] for end in (".kernel", A, B))
        merged[f"{module}.kernel"] = kernel + a @ b
        if module + M in params:
            merged[f"{module}.kernel"] *= params[module + M] / column_norms(kernel, a, b)
    return merged


def _first(name: str, shape: tuple[int, ...], key: Key[Array, ""]) -> Array:
    """B = 0, so that training starts at the base; A normal with standard deviation 1 / r, as in diffusers' scripts."""
    if name.endswith(B):
        return jnp.zeros(shape)
    return jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape) / shape[-1]
