"""Training programs compiled from shapes, in a thread, while class images are painted and photos are encoded.

XLA releases Python's lock while it compiles. An error of the thread is raised where its program is asked for.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from dreambooth_jax.data.buckets import Size
from dreambooth_jax.data.class_folders import class_folders
from dreambooth_jax.data.encode import distinct_captions
from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.diffusion.examples import TrainingData
from dreambooth_jax.runs.job import data_shapes, key_shape, lower_steps, pairs_prior, split_shapes, state_shapes
from dreambooth_jax.runs.setup import Run, training_sizes

# (state, frozen, data, key) of a program
Arguments = tuple[Any, ...]
# (number of the program, *arguments) -> the compiled program
Programs = Callable[..., jax.stages.Compiled]
Compile = Callable[[jax.stages.Lowered], jax.stages.Compiled]


@contextlib.contextmanager
def compiling(run: Run, compile_steps: Compile) -> Iterator[Programs]:
    """`compiling_of` the programs of all shapes of the run's examples."""
    sizes = training_sizes(run)

    def expected(number: int) -> Arguments:
        trainable, frozen = split_shapes(run.job)
        data = expected_data(run, run.examples[number], sizes[number])
        return state_shapes(run.job, trainable), frozen, data, key_shape(run.job)

    def lower(number: int, *arguments: Any) -> jax.stages.Lowered:
        return lower_steps(run.job, *arguments, size=sizes[number])

    with compiling_of(len(sizes), expected, lower, compile_steps) as program:
        yield program


@contextlib.contextmanager
def compiling_of(
    count: int,
    expected: Callable[[int], Arguments],
    lower: Callable[..., jax.stages.Lowered],
    compile_steps: Compile = jax.stages.Lowered.compile,
) -> Iterator[Programs]:
    """Begins to compile programs; yields what gives each when it is compiled.

    For arguments of other shapes than expected, such as class images with captions of their own, it compiles again.
    Whoever leaves by an error does not wait for the thread.

    Args:
        count: number of programs.
        expected: number of a program -> shapes of its arguments.
        lower: (number, *arguments or their shapes) -> the program.
        compile_steps: way in which it is compiled.
    """
    pool = ThreadPoolExecutor(1, "compiler")

    def begin(number: int) -> tuple[Arguments, jax.stages.Compiled]:
        arguments = expected(number)
        return arguments, compile_steps(lower(number, *arguments))

    begun = [pool.submit(begin, number) for number in range(count)]

    def program(number: int, *arguments: Any) -> jax.stages.Compiled:
        shapes, compiled = begun[number].result()
        if _shapes(arguments) == _shapes(shapes):
            return compiled
        return compile_steps(lower(number, *arguments))

    try:
        yield program
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
