"""Many subjects in one program: the training step mapped over a leading axis of everything that a subject owns.

The frozen base has no such axis: a layer's x W is one product for all subjects, and only (x A) B is theirs. Every
subject keeps its own key, clipping norm, optimizer state and stop: lane k computes what a run of subject k alone does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, picks
from dreambooth_jax.diffusion.step import Metrics, TrainState


class Lanes(NamedTuple):
    """The subjects' data.

    Attributes:
        data: instance examples and order with a leading axis of subjects; prior examples too, if they differ.
        stops: number of steps of every subject.
    """

    data: TrainingData
    stops: Int[Array, "n"]


def over_subjects(step: Callable[..., tuple[TrainState, Metrics]], *, shared_prior: bool) -> Callable:
    """`step` over all subjects: (states, frozen, Lanes, keys) -> (states, metrics [n]); a subject stops at its step.

    Args:
        step: (state, frozen, data, key) -> (state, metrics).
        shared_prior: whether all subjects have the same prior examples, without a leading axis.
    """
    axes = TrainingData(0, None if shared_prior else 0, 0)
    mapped = jax.vmap(step, in_axes=(0, None, axes, 0))

    def lanes_step(states: TrainState, frozen: Any, lanes: Lanes, keys: Array) -> tuple[TrainState, Metrics]:
        after, metrics = mapped(states, frozen, lanes.data, keys)
        trains = states.step < lanes.stops
        keep = lambda new, old: jnp.where(trains.reshape(-1, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(keep, after, states), metrics

    return lanes_step


def stack(trees: Sequence[Any]) -> Any:
    """One tree whose arrays have a leading axis of subjects."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree: Any, number: int) -> Any:
    """The part of one subject."""
    return jax.tree.map(lambda x: x[number], tree)


def stacked_data(
    instances: Sequence[EncodedExamples], priors: Sequence[EncodedExamples | None], keys: Sequence[Array], *,
    batch_size: int, steps: int,
) -> TrainingData:  # fmt: skip
    """The subjects' examples in arrays of one size: rows that no order names fill up the shorter ones.

    Args:
        priors: per subject; the very same object for all is stored once.
        keys: the subjects' keys, of which the order of their examples comes.
        steps: number of steps for which the order is made.
    """
    most = [max(len(x.mean) for x in instances), max(len(jax.tree.leaves(x.cond)[0]) for x in instances)]
    padded = [x._replace(
        mean=_filled(x.mean, most[0]), std=_filled(x.std, most[0]), cond_index=_filled(x.cond_index, most[0]),
        cond=jax.tree.map(lambda c: _filled(c, most[1]), x.cond),
        of_example=jax.tree.map(lambda c: _filled(c, most[0]), x.of_example),
    ) for x in instances]  # fmt: skip
    order = [picks(len(x.mean), batch_size, key, steps) for x, key in zip(instances, keys, strict=True)]
    shared = all(prior is priors[0] for prior in priors)
    return TrainingData(stack(padded), priors[0] if shared else stack(priors), jnp.stack(order))


def _filled(x: Array, count: int) -> Array:
    return jnp.concatenate([x, jnp.repeat(x[:1], count - len(x), axis=0)]) if len(x) < count else jnp.asarray(x)


def finished(steps_before: np.ndarray, steps_after: np.ndarray, stops: np.ndarray) -> list[int]:
    """The subjects that have reached their stop between two calls."""
    return np.flatnonzero((steps_before < stops) & (steps_after >= stops)).tolist()
