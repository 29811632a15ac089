"""Training programs compiled from shapes, in a thread, while class images are painted and photos are encoded.

XLA releases Python's lock while it compiles. An error of the thread is raised where its program is asked for.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import Array, Key

from dreambooth_jax.data.buckets import Size
from dreambooth_jax.data.class_images import class_folders
from dreambooth_jax.data.encode import distinct_captions
from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.diffusion.examples import TrainingData
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.models.params import Params, Shapes
from dreambooth_jax.runs.job import data_shapes, key_shape, lower_steps, pairs_prior, split_shapes, state_shapes
from dreambooth_jax.runs.setup import Run, training_sizes

# (number of the bucket, state, frozen, data, key) -> the compiled program
Arguments = tuple[TrainState, Params | Shapes, TrainingData, Key[Array, ""] | jax.ShapeDtypeStruct]
Programs = Callable[..., jax.stages.Compiled]


@contextlib.contextmanager
def compiling(run: Run, compile_steps: Callable[[jax.stages.Lowered], jax.stages.Compiled]) -> Iterator[Programs]:
    """Begins to compile the programs of all shapes of the run's examples; yields what gives each when it is compiled.

    For arguments of other shapes than expected, such as class images with captions of their own, it compiles again.
    Whoever leaves by an error does not wait for the thread.
    """
    sizes = training_sizes(run)
    pool = ThreadPoolExecutor(1, "compiler")
    begun = [
        pool.submit(_compile, run, expected_data(run, examples, size), size, compile_steps)
        for examples, size in zip(run.examples, sizes, strict=True)
    ]

    def program(number: int, *arguments: Any) -> jax.stages.Compiled:
        expected, compiled = begun[number].result()
        if _shapes(arguments) == _shapes(expected):
            return compiled
        return compile_steps(lower_steps(run.job, *arguments, size=sizes[number]))

    try:
        yield program
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(
    run: Run, data: TrainingData, size: Size, compile_steps: Callable[[jax.stages.Lowered], jax.stages.Compiled]
) -> tuple[Arguments, jax.stages.Compiled]:
    trainable, frozen = split_shapes(run.job)
    arguments = (state_shapes(run.job, trainable), frozen, data, key_shape(run.job))
    return arguments, compile_steps(lower_steps(run.job, *arguments, size))


def expected_data(run: Run, examples: Examples, size: Size) -> TrainingData:
    """Shapes of the training data of one bucket, before class images are painted."""
    config = run.config
    count = 0
    if config.prior_preservation and not pairs_prior(config):
        count = max(config.num_class_images, sum(len(list_images(folder)) for folder in class_folders(config)))
    captions, _ = distinct_captions(examples, config.shuffle_tags, config.seed)
    conditions = len(captions) + (config.caption_dropout > 0)
    return data_shapes(run.job, len(examples.captions), count, size, conditions)


def _shapes(arguments: Arguments) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), arguments)
