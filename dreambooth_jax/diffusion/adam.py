"""Adam with moments in 16 or 8 bits.

Where the gradient is 0 a step takes a thousandth of the second moment v (b2 = .999), less than half the spacing of
bfloat16 numbers, 2^-8, or of eight bits, 2^-4. Rounded to the nearest number, v would never fall. Rounded up or down at
random, v has the right mean.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PyTree

from dreambooth_jax.diffusion.rounding import EightBits, from_eight_bits, in_bfloat16, in_eight_bits, random_bits

Moment: TypeAlias = Array | EightBits


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    first_dtype: DTypeLike,
    second_dtype: DTypeLike,
    limit: float | Float[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam (arXiv 1412.6980, algorithm 1) with moments of these dtypes: float32, bfloat16, or int8 as in `EightBits`.

    The update is made of both moments before they are rounded. The state is that of optax's `scale_by_adam`. In eight
    bits a moment's bound is made of the gradient's largest magnitudes as the moment is of the gradient; vectors stay in
    float32. A first moment in bfloat16 is rounded to the nearest number: a step takes a tenth of it.

    The keywords `grad_peaks` and `grad_norm` give largest magnitudes and norm that are already known. Found in the
    updates alone, they would be known too late: each update would be computed twice, or written and read again.

    Args:
        limit: norm to which `clip_by_global_norm` scaled the updates, after peaks and norm were found; None if they are
            not clipped.
    """

    def init(params: PyTree[Array]) -> optax.ScaleByAdamState:
        first = jax.tree.map(lambda p: _zeros(p, first_dtype, jnp.int8), params)
        second = jax.tree.map(lambda p: _zeros(p, second_dtype, jnp.uint8), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), first, second)

    def update(
        updates: PyTree[Array],
        state: optax.ScaleByAdamState,
        params: PyTree | None = None,
        *,
        grad_peaks: PyTree[Array] | None = None,
        grad_norm: Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree[Array], optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        corrections = 1 / (1 - b1**count), 1 / (1 - b2**count)
        scale = 1.0
        if grad_peaks is None or grad_norm is None:
            grad_peaks = largest_magnitudes(updates)
        elif limit is not None:
            scale = limit / jnp.maximum(grad_norm, limit)
        leaves, structure = jax.tree.flatten(updates)
        others = (jax.tree.leaves(tree, is_leaf=_is_held) for tree in (state.mu, state.nu, grad_peaks))
        columns: tuple[list[Array], list[Moment], list[Moment]] = ([], [], [])
        for number, (g, first, second, peak) in enumerate(zip(leaves, *others, strict=True)):
            g, peak = g.astype(jnp.float32), scale * peak.astype(jnp.float32)
            m, v = b1 * _exact(first) + (1 - b1) * g, b2 * _exact(second) + (1 - b2) * g * g
            columns[0].append(m * corrections[0] / (jnp.sqrt(v * corrections[1]) + eps))
            bits = random_bits(g.shape, count, number)
            if isinstance(first, EightBits):
                bound = b1 * first.bound + (1 - b1) * peak
                columns[1].append(in_eight_bits(m, bound, bits << 16, jnp.int8))  # bits of its own
            else:
                columns[1].append(m.astype(first.dtype))
            if isinstance(second, EightBits):
                bound = b2 * second.bound + (1 - b2) * peak * peak
                columns[2].append(in_eight_bits(v, bound, bits, jnp.uint8))
            else:
                columns[2].append(in_bfloat16(v, bits) if second.dtype == jnp.bfloat16 else v)
        scaled, firsts, seconds = (jax.tree.unflatten(structure, column) for column in columns)
        return scaled, optax.ScaleByAdamState(count, firsts, seconds)

    return optax.GradientTransformationExtraArgs(init, update)


def largest_magnitudes(updates: PyTree[Array]) -> PyTree[Array]:
    """The largest magnitude in each array, for `grad_peaks`."""
    return jax.tree.map(lambda g: jnp.abs(g).max(), updates)


def _is_held(x: Any) -> bool:
    return isinstance(x, EightBits)


def _exact(moment: Moment) -> Float32[Array, "..."]:
    return from_eight_bits(moment) if isinstance(moment, EightBits) else moment.astype(jnp.float32)


def _zeros(param: Array, dtype: DTypeLike, codes: DTypeLike) -> Moment:
    if dtype != "int8":
        return jnp.zeros_like(param, dtype=dtype)
    if param.ndim < 2:
        return jnp.zeros_like(param, dtype=jnp.float32)
    return EightBits(jnp.zeros_like(param, dtype=codes), jnp.zeros((), jnp.float32))
