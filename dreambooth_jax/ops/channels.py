"""Sums over pixels and tokens, broadcasts whose gradients are such sums, and repeated channels, fast on CPU too (see
devices/workarounds.py, "sums over rows")."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def row_sums(x: Float[Array | np.ndarray, "*b c"], kept: int = 0) -> Float[Array, "*_kept c"]:
    """The sum over all axes but the first `kept` and the last."""
    return jax.lax.platform_dependent(
        x, cpu=functools.partial(_sums_on_cpu, kept=kept), default=functools.partial(_sums, kept=kept)
    )


def _sums(x: Float[Array | np.ndarray, "*b c"], kept: int) -> Float[Array, "*_kept c"]:
    return x.sum(range(kept, x.ndim - 1))


def _sums_on_cpu(x: Float[Array | np.ndarray, "*b c"], kept: int) -> Float[Array, "*_kept c"]:
    """As a product with ones, in float32."""
    rows = x.reshape(*x.shape[:kept], -1, x.shape[-1]).astype(jnp.float32)
    ones = jnp.ones((*x.shape[:kept], 1, rows.shape[-2]), jnp.float32)
    return (ones @ rows).squeeze(-2).astype(x.dtype)


def repeat_channels(x: Float[Array, "b g"], times: int) -> Float[Array, "b c"]:
    """Every channel `times` times, one after the other."""

    def on_cpu(x: Float[Array, "b g"]) -> Float[Array, "b c"]:
        """A product is computed once; repetition would be repeated for every pixel, with a division of its index."""
        return x @ jnp.repeat(jnp.eye(x.shape[1], dtype=x.dtype), times, axis=1)

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda x: jnp.repeat(x, times, axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: Float[Array | np.ndarray, "*kept c"], shape: tuple[int, ...]) -> Float[Array, "*_b c"]:
    """`x` broadcast to `shape`, along the axes between the first ones, which it has, and the last."""
    between = len(shape) - x.ndim
    return jnp.broadcast_to(x.reshape(*x.shape[:-1], *[1] * between, x.shape[-1]), shape)


def _spread_forward(x: Float[Array | np.ndarray, "*kept c"], shape: tuple[int, ...]) -> tuple[Array, int]:
    return spread(x, shape), x.ndim - 1


def _spread_backward(shape: tuple[int, ...], kept: int, out: Float[Array, "*_b c"]) -> tuple[Array]:
    return (row_sums(out, kept),)


spread.defvjp(_spread_forward, _spread_backward)
