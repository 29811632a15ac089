"""Values that XLA's simplifier must leave as they are written."""

from typing import TypeVar

import jax
from jaxtyping import PyTree

Tree = TypeVar("Tree")


def after(values: Tree, earlier: PyTree = ()) -> Tree:
    """`values` for a computation that starts once `earlier` is known and is not merged with an equal one before it.
    Without the barrier the compiler takes the first result and keeps it in memory."""
    return jax.lax.optimization_barrier((values, earlier))[0]
