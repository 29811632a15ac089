"""Examples of several shapes: every step takes one of them, a function of the step's number."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from dreambooth_jax.diffusion.examples import TrainingData, ordered, picks


def in_turns(
    buckets: Sequence[TrainingData], batch_size: int, key: Key[Array, ""], steps: int, paired: bool = False
) -> tuple[tuple[TrainingData, ...], Int[np.ndarray, "steps"]]:
    """The buckets with the order of their examples, and the bucket of every step.

    Of N consecutive steps, N examples in all, a bucket of n examples has n, in an order of its own for every N: every
    example is drawn equally often. Within a bucket an epoch follows the other, as without buckets. One bucket has the
    order that the step would pick. The first steps do not depend on `steps`.

    Args:
        batch_size: number of instance examples of a step.
        key: the run's key.
        steps: number of steps of the run.
        paired: see `draw`.
    """
    rows = [ordered(data, batch_size, key, steps, paired) for data in buckets]
    if len(buckets) == 1:
        return (_with_order(buckets[0], rows[0]),), np.zeros(steps, np.int32)
    counts = [len(data.instance.mean) for data in buckets]
    example = np.asarray(picks(sum(counts), 1, jax.random.fold_in(key, len(counts)), steps))[:, 0]
    bucket = np.searchsorted(np.cumsum(counts), example, side="right").astype(np.int32)
    turned = []
    for number, (data, count) in enumerate(zip(buckets, counts, strict=True)):
        turns, order = np.flatnonzero(bucket == number), np.array(rows[number])
        order[turns, :batch_size] = picks(count, batch_size, key, len(turns))
        turned.append(_with_order(data, order))
    return tuple(turned), bucket


def _with_order(data: TrainingData, order: Array | np.ndarray) -> TrainingData:
    return data._replace(order=jax.device_put(order, data.instance.cond_index.sharding))


def alike(bucket: Int[np.ndarray, "steps"], step: int) -> int:
    """Number of steps from `step` on that take the same bucket."""
    others = np.flatnonzero(bucket[step:] != bucket[step])
    return int(others[0]) if len(others) else len(bucket) - step
