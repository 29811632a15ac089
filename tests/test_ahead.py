"""Training programs that are compiled from shapes, before the data are there."""

import threading
from unittest.mock import Mock

import jax
import pytest
from support.runs import config_of

from dreambooth_jax.runs.ahead import compiling, expected_data
from dreambooth_jax.runs.job import data_shapes, key_shape, split_shapes, state_shapes
from dreambooth_jax.runs.setup import set_up, training_sizes


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("ahead") / "run", base=micro, num_class_images=20)
    return set_up(config, jax.devices()[:1])


def arguments(run, photos=10, classes=20):
    """Shapes of the program's arguments: the subject's views and the class images."""
    trainable, frozen = split_shapes(run.job)
    return state_shapes(run.job, trainable), frozen, data_shapes(run.job, photos, classes), key_shape(run.job)


@pytest.mark.slow
def test_a_program_is_compiled_once_beside_the_main_thread(run):
    threads = []

    def compile_steps(lowered):
        threads.append(threading.current_thread())
        return Mock(spec=jax.stages.Compiled)

    with compiling(run, compile_steps) as program:
        first = program(0, *arguments(run))
        assert program(0, *arguments(run, photos=3)) is first  # the room is the same
        assert len(threads) == 1 and threads[0] is not threading.main_thread()
        # More class images than expected, from a folder that has grown meanwhile.
        assert program(0, *arguments(run, classes=65)) is not first
    assert threads[1:] == [threading.main_thread()]


def test_an_error_of_the_compiler_is_raised_where_the_program_is_needed(run):
    def fail(lowered):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with compiling(run, fail) as program, pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        program(0, *arguments(run))


def test_more_class_images_than_asked_for_are_expected(run):
    (size,) = training_sizes(run)
    before = expected_data(run, run.examples[0], size).prior.mean.shape[0]
    folder = run.workdir / "class_images"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number}.png").write_bytes(b"")
    after = expected_data(run, run.examples[0], size).prior.mean.shape[0]
    assert (before, after) == (64, 256)
