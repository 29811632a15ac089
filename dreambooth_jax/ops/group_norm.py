"""Group normalisation (arXiv 1803.08494), alone or with SiLU behind it, whose backward pass keeps the argument and two
numbers per group.

Differentiated operation by operation it keeps the centred argument in float32 too, twice the bytes of a bfloat16
argument, and SiLU keeps its argument and the sigmoid: all of them are written once and read once more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

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
    grouped = _grouped(x, groups)
    mean = grouped.mean((1, 3))
    variance = jnp.square(grouped - mean[:, None, :, None]).mean((1, 3))
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
    d, n = _grouped(dy * scale, groups), _grouped(normed, groups)
    dx = d - d.mean((1, 3), keepdims=True) - n * (d * n).mean((1, 3), keepdims=True)
    dx = (dx * rate[:, None, :, None]).reshape(x.shape).astype(x.dtype)
    return dx, (dy * normed).sum((0, 1, 2)).astype(scale.dtype), dy.sum((0, 1, 2)).astype(bias.dtype)


def _grouped(x: Image, groups: int) -> Float[Array, "b hw g n"]:
    return jnp.asarray(x, jnp.float32).reshape(len(x), -1, groups, x.shape[-1] // groups)


def _normed(x: Image, mean: Float[Array, "b g"], rate: Float[Array, "b g"]) -> Float[Array, "b h w c"]:
    return ((_grouped(x, mean.shape[1]) - mean[:, None, :, None]) * rate[:, None, :, None]).reshape(x.shape)


group_norm.defvjp(_forward, _backward)
