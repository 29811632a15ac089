"""Group normalisation (arXiv 1803.08494), alone or with SiLU behind it, whose backward pass keeps the argument and two
numbers per group.

Differentiated operation by operation it keeps the centred argument in float32 too, twice the bytes of a bfloat16
argument, and SiLU keeps its argument and the sigmoid: all of them are written once and read once more.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.ops.channels import repeat_channels, row_sums

Image = Float[Array | np.ndarray, "b h w c"]
Vector = Float[Array | np.ndarray, "c"]
Saved = tuple[Image, Vector, Vector, Float[Array, "b g"], Float[Array, "b g"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: Image, scale: Vector, bias: Vector, groups: int, eps: float, silu: bool, dtype: DTypeLike
) -> Float[Array, "b h w c"]:
    """(x - mean) / sqrt(variance + eps) scale + bias, of `dtype`, with `silu` then SiLU.

    Statistics are over all pixels and the channels of a group, in float32, the variance in two passes as in PyTorch.
    """
    return _forward(x, scale, bias, groups, eps, silu, dtype)[0]


def _forward(
    x: Image, scale: Vector, bias: Vector, groups: int, eps: float, silu: bool, dtype: DTypeLike
) -> tuple[Float[Array, "b h w c"], Saved]:
    mean = _group_means(row_sums(_float32(x), 1), x, groups)
    variance = _group_means(row_sums(jnp.square(_float32(x) - _per_channel(mean, x)), 1), x, groups)
    rate = jax.lax.rsqrt(variance + eps)
    y = (_normed(x, mean, rate) * scale + bias).astype(dtype)
    return jax.nn.silu(y) if silu else y, (x, scale, bias, mean, rate)


def _backward(
    groups: int, eps: float, silu: bool, dtype: DTypeLike, saved: Saved, dy: Image
) -> tuple[Image, Vector, Vector]:
    """dx = (d - mean(d) - n mean(d n)) / sqrt(variance + eps), with d = dy scale and n the normed argument; means are
    those of the statistics."""
    x, scale, bias, mean, rate = saved
    normed = _normed(x, mean, rate)
    if silu:
        _, pull = jax.vjp(jax.nn.silu, (normed * scale + bias).astype(dtype))
        (dy,) = pull(dy)
    dy = dy.astype(jnp.float32)
    by_bias, by_scale = row_sums(dy, 1), row_sums(dy * normed, 1)
    first, second = (_per_channel(_group_means(d * scale, x, groups), x) for d in (by_bias, by_scale))
    dx = (dy * scale - first - normed * second) * _per_channel(rate, x)
    return dx.astype(x.dtype), by_scale.sum(0).astype(scale.dtype), by_bias.sum(0).astype(bias.dtype)


def _float32(x: Image) -> Float[Array, "b h w c"]:
    return jnp.asarray(x, jnp.float32)


def _group_means(sums: Float[Array, "b c"], x: Image, groups: int) -> Float[Array, "b g"]:
    """Means over the pixels of `x` and the channels of a group, from the sums over pixels."""
    return sums.reshape(len(sums), groups, -1).sum(-1) / (math.prod(x.shape[1:]) // groups)


def _per_channel(of_groups: Float[Array, "b g"], x: Image) -> Float[Array, "b 1 1 c"]:
    return repeat_channels(of_groups, x.shape[-1] // of_groups.shape[-1])[:, None, None]


def _normed(x: Image, mean: Float[Array, "b g"], rate: Float[Array, "b g"]) -> Float[Array, "b h w c"]:
    return (_float32(x) - _per_channel(mean, x)) * _per_channel(rate, x)


group_norm.defvjp(_forward, _backward)
