"""Values that XLA's simplifier must leave as they are written."""

from typing import Any, TypeVar

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Tree = TypeVar("Tree")


def keep_rounding(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """x rounded to `dtype`, in its own dtype. Without the barrier the compiler removes both conversions and keeps all
    bits (xla_allow_excess_precision)."""
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


def after(values: Tree, earlier: Any = ()) -> Tree:
    """`values` for a computation that starts once `earlier` is known and is not merged with an equal one before it.
    Without the barrier the compiler takes the first result and keeps it in memory."""
    return jax.lax.optimization_barrier((values, earlier))[0]
