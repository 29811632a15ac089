"""Many subjects in one program: the training step mapped over a leading axis of everything that a subject owns.

The frozen base has no such axis: a layer's x W is one product for all subjects, and only (x A) B is theirs. Every
subject keeps its own key, clipping norm, optimizer state, learning rate and stop: lane k computes what a run of subject
k alone does.

Ranks may differ. The factors of a lower rank are filled up with zeros, columns of A and rows of B: the gradient of a
column of A is proportional to its row of B, and the other way round, so both stay zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dreambooth_jax.adapters.factors import LORA_B, parse
from dreambooth_jax.diffusion.examples import EncodedExamples, Numbers, TrainingData, ordered, room, with_room
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.models.params import Params, Shapes

Tree = TypeVar("Tree")
# (states, frozen, Lanes, keys, number of steps) -> (states, metrics [steps, n])
RunLanes = Callable[..., tuple[TrainState, Metrics]]


class Lanes(NamedTuple):
    """The subjects' data.

    Attributes:
        data: instance examples, order and numbers with a leading axis of subjects; prior examples too, if they differ.
        stops: number of steps of every subject.
        scales: factor on the low-rank differences of every subject, see `rescaled`.
    """

    data: TrainingData
    stops: Int[Array, "n"]
    scales: Float[Array, "n"]


def over_subjects(
    step: Callable[..., tuple[TrainState, Metrics]], *, shared_prior: bool
) -> Callable[[TrainState, Params, Lanes, Array], tuple[TrainState, Metrics]]:
    """`step` over all subjects: (states, frozen, Lanes, keys) -> (states, metrics [n]); a subject stops at its step.

    Args:
        step: (state, (frozen, scale), data, key) -> (state, metrics), with one of `Lanes.scales`.
        shared_prior: whether all subjects have the same prior examples, without a leading axis.
    """
    axes = TrainingData(0, None if shared_prior else 0, 0, 0)
    mapped = jax.vmap(step, in_axes=(0, (None, 0), axes, 0))

    def lanes_step(states: TrainState, frozen: Params, lanes: Lanes, keys: Array) -> tuple[TrainState, Metrics]:
        after, metrics = mapped(states, (frozen, lanes.scales), lanes.data, keys)
        trains = states.step < lanes.stops
        keep = lambda new, old: jnp.where(trains.reshape(-1, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(keep, after, states), metrics

    return lanes_step


def over_devices(
    run: RunLanes, mesh: Mesh, place: PartitionSpec, frozen: Mapping[str, PartitionSpec], *, shared_prior: bool
) -> RunLanes:
    """`run` on the mesh, every device for its own subjects: the devices exchange nothing.

    Args:
        place: placement of the axis of subjects.
        frozen: placement of the frozen parameters; `run` gets every device's share of them.
        shared_prior: see `over_subjects`.
    """
    whole = PartitionSpec()
    lanes = Lanes(TrainingData(place, whole if shared_prior else place, place, place), place, place)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(place, frozen, lanes, place, whole),
        out_specs=(place, PartitionSpec(None, *place)),
        check_vma=False,
    )


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose arrays have a leading axis of subjects."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree: Tree, number: int | Int[Array, ""] | np.int32) -> Tree:
    """The part of one subject."""
    return jax.tree.map(lambda x: x[number], tree)


def stacked_data(
    instances: Sequence[EncodedExamples],
    priors: Sequence[EncodedExamples | None],
    keys: Sequence[Array],
    *,
    batch_size: int,
    steps: int,
    numbers: Sequence[Numbers],
) -> TrainingData:
    """The subjects' examples in arrays of one size: rows that no order names fill up the shorter ones.

    Args:
        priors: per subject; the very same object for all is stored once.
        keys: the subjects' keys, of which the order of their examples comes.
        steps: number of steps for which the order is made.
        numbers: of the subjects' runs.
    """
    own = [TrainingData(*halves) for halves in zip(instances, priors, strict=True)]
    order = [ordered(data, batch_size, key, room(steps)) for data, key in zip(own, keys, strict=True)]
    shared = all(prior is priors[0] for prior in priors)
    prior = with_most_room(priors[:1] if shared else priors)
    return TrainingData(
        stack(with_most_room(instances)),
        (prior[0] if shared else stack(prior)) if prior else None,
        jnp.stack(order),
        jax.tree.map(lambda *column: jnp.asarray(column, jnp.float32), *numbers),
    )


def with_most_room(all_: Sequence[EncodedExamples | None]) -> list[EncodedExamples]:
    """The examples of several subjects, each in arrays of the room that the largest needs; [] of None."""
    found = [x for x in all_ if x is not None]
    rows = max((room(len(x.mean)) for x in found), default=0)
    conditions = max((room(len(jax.tree.leaves(x.cond)[0])) for x in found), default=0)
    return [with_room(x, rows, conditions) for x in found]


def rescaled(trainable: Params, scale: Array) -> Params:
    """LoRA's factors with their differences times `scale`: a lane of rank r has alpha / r where the largest rank has
    alpha / R."""
    return {name: scale * x if parse(name)[1] == LORA_B else x for name, x in trainable.items()}


def padded_to(shapes: Shapes, trainable: Params) -> Params:
    """Factors filled up with zeros to the ranks of `shapes`; `cut_to` is the inverse."""
    return {
        name: jnp.pad(x, [(0, more - own) for more, own in zip(shapes[name].shape, x.shape, strict=True)])
        for name, x in trainable.items()
    }


def cut_to(shapes: Shapes, trainable: Params) -> Params:
    """The first rows and columns of every factor, as many as `shapes` has."""
    return {name: trainable[name][tuple(slice(size) for size in x.shape)] for name, x in shapes.items()}


def finished(before: int, after: int, stops: Int[np.ndarray, "n"]) -> list[int]:
    """The subjects that reach their stop between two steps of the run."""
    return np.flatnonzero((before < stops) & (stops <= after)).tolist()
