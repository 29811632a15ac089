"""Frozen kernels in eight bits: W ~ q s, whole numbers q from -127 to 127 and one step s per output channel.

Quantisation of the weights alone (as in arXiv 2208.07339, section 2.1): a product is computed with q s in its own
dtype, so that memory is saved and nothing else changes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

LARGEST = 127


def quantise(kernel: Float[Array, "*k cin cout"]) -> tuple[Int8[Array, "*k cin cout"], Float[Array, "cout"]]:
    """(q, s), with s = max|W| / 127 per output channel: |W - q s| <= s / 2. The step of a channel of zeros is 1."""
    weights = kernel.astype(jnp.float32)
    largest = jnp.abs(weights).max(range(kernel.ndim - 1))
    step = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return jnp.round(weights / step).astype(jnp.int8), step


def dequantise(
    q: Int8[Array, "*k cin cout"], step: Float[Array, "cout"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*k cin cout"]:
    """q s, computed in float32."""
    return (q.astype(jnp.float32) * step).astype(dtype)


def product(
    times: Callable[[Array, Array], Array], x: Array, q: Int8[Array, "*k cin cout"], step: Float[Array, "cout"]
) -> Array:
    """times(x, W), of x's dtype. The backward pass makes W of q and s again: kept for it, all kernels together would
    take the memory that eight bits save."""
    return jax.checkpoint(lambda x, q, step: times(x, dequantise(q, step, x.dtype)))(x, q, step)
