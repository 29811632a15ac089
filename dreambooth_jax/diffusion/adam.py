"""Adam with both moments in bfloat16: the second one is rounded at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Integer, PyTree, UInt32


def scale_by_adam(b1: float, b2: float, eps: float, first_dtype: DTypeLike) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980, algorithm 1) whose second moment v is kept in bfloat16.

    Where the gradient is 0 a step takes a thousandth of v (b2 = .999), less than half of bfloat16's spacing, 2^-8.
    Rounded to the nearest number, v would never fall. Rounded up or down at random, v has the right mean. The update
    is made of both moments before they are rounded. The state is that of optax's `scale_by_adam`.

    Args:
        first_dtype: of the first moment, which is rounded to the nearest number.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        def zeros(dtype: DTypeLike) -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)

        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(first_dtype), zeros(jnp.bfloat16))

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        first = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, grads)
        second = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state.nu, grads)
        scales = 1 / (1 - b1**count), 1 / (1 - b2**count)
        scaled = jax.tree.map(lambda m, v: m * scales[0] / (jnp.sqrt(v * scales[1]) + eps), first, second)
        leaves, structure = jax.tree.flatten(second)
        rounded = [round_at_random(v, count, number) for number, v in enumerate(leaves)]
        first = jax.tree.map(lambda m: m.astype(first_dtype), first)
        return scaled, optax.ScaleByAdamState(count, first, jax.tree.unflatten(structure, rounded))

    return optax.GradientTransformation(init, update)


def round_at_random(x: Float32[Array, "..."], step: Integer[Array, ""], number: int) -> BFloat16[Array, "..."]:
    """One of the two bfloat16 numbers next to each element; the mean over steps is the element.

    A bfloat16 number is the upper half of a float32 number: 16 random bits are added to the lower half, whose carry
    rounds up. The bits are a hash of the element's place, so that they are computed where the element is, on any number
    of devices, and are never stored.

    Args:
        x: finite, at least 0.
        step: number of the update. Every update has bits of its own.
        number: of the tensor. Every tensor has bits of its own.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hash(x.shape, step, number) >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _hash(shape: tuple[int, ...], step: Integer[Array, ""], number: int) -> UInt32[Array, "..."]:
    """32 bits for every element: the hashes of its indices, of the step and of the tensor, added and mixed.

    Those of the indices are vectors, so that few operations are left for an element.
    """
    total = _mixed(step.astype(jnp.uint32) * np.uint32(0x9E3779B1) + np.uint32(number))
    for axis, size in enumerate(shape):
        index = jnp.arange(size, dtype=jnp.uint32) + np.uint32(axis * 0x3C6EF372)
        total += _mixed(index).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return (total ^ (total >> 15)) * np.uint32(0x2C1B3C6D)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
