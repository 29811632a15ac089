"""The program of a run of many subjects (adapters.many), from arrays or from shapes, as runs.job has that of one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dreambooth_jax.adapters.many import Lanes, over_devices, over_subjects
from dreambooth_jax.devices.sharding import batch_sharding, gathered
from dreambooth_jax.diffusion.examples import TrainingData
from dreambooth_jax.diffusion.step import Metrics, TrainState, run_steps
from dreambooth_jax.models.params import Params, Shapes
from dreambooth_jax.runs.job import (
    Job,
    data_shapes,
    key_shape,
    lower_calls,
    split_shapes,
    state_shapes,
    training_step,
)


def subject_sharding(mesh: Mesh, count: int) -> NamedSharding:
    """Subjects divided over the mesh, as far as their number allows it."""
    return batch_sharding(mesh, count)


def subjects_a_device(mesh: Mesh, count: int) -> int:
    """Number of subjects that every device trains."""
    return subject_sharding(mesh, count).shard_shape((count,))[0]


def lower_many(
    job: Job,
    states: TrainState,
    frozen: Params | Shapes,
    lanes: Lanes,
    keys: Array | jax.ShapeDtypeStruct,
) -> jax.stages.Lowered:
    """The call of up to `steps_per_call` steps of all subjects: (states, frozen, lanes, keys, count) -> (states,
    metrics). On several devices each computes its own subjects, and only the metrics are brought together.

    Arguments may be arrays or ShapeDtypeStructs with shardings. The states are donated.
    """
    shared, mesh = lanes.data.prior is None or lanes.data.prior.mean.ndim == 2, job.mesh
    step = over_subjects(training_step(job, mapped=True), shared_prior=shared)
    if mesh.size == 1:
        return lower_calls(job, run_steps(step, job.config.steps_per_call), states, frozen, lanes, keys)
    places: dict[str, PartitionSpec] = {name: x.sharding.spec for name, x in frozen.items()}

    def on_a_device(states: TrainState, frozen: Params, lanes: Lanes, keys: Array) -> tuple[TrainState, Metrics]:
        return step(states, gathered(frozen, places), lanes, keys)

    run = run_steps(on_a_device, job.config.steps_per_call)
    divided = over_devices(run, mesh, keys.sharding.spec, places, shared_prior=shared)
    return lower_calls(job, divided, states, frozen, lanes, keys)


def many_shapes(
    job: Job,
    count: int,
    num_instance: int,
    *,
    num_class: int | None = None,
    captions: int = 1,
    shared_prior: bool = True,
) -> tuple[TrainState, Shapes, Lanes, jax.ShapeDtypeStruct]:
    """The arguments of `lower_many` as shapes, (states, frozen, lanes, keys), for `count` subjects.

    Args:
        num_instance: most images of a subject.
        num_class: most class images of a noun; default: the config's.
        captions: most captions of a subject.
        shared_prior: whether all have the same class images.
    """
    place = subject_sharding(job.mesh, count)

    def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=place)

    every: Any = functools.partial(jax.tree.map, stacked)
    trainable, frozen = split_shapes(job)
    data = data_shapes(job, num_instance, num_class or job.config.num_class_images, captions=captions)
    of_subjects = TrainingData(*map(every, data))
    data = of_subjects._replace(prior=data.prior) if shared_prior else of_subjects
    number = functools.partial(jax.ShapeDtypeStruct, ())
    lanes = Lanes(data, *every((number(jnp.int32), number(jnp.float32))))
    return every(state_shapes(job, trainable)), frozen, lanes, every(key_shape(job))
