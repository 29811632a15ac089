"""What a batch takes from the examples: orders of many examples, conditions of single examples, augmentation."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_jax.diffusion.examples import (
    PERMUTED,
    EncodedExamples,
    TrainingData,
    _mixed,
    draw,
    ordered,
    pick,
    room,
    with_room,
)
from dreambooth_jax.diffusion.schedulers import process_from_scheduler

KEY = jax.random.key(3)
PROCESS = process_from_scheduler({"beta_schedule": "scaled_linear"})


PICK = jax.jit(pick, static_argnums=(0, 1))


def epoch(n: int, number: int, key=KEY) -> np.ndarray:
    """The order of an epoch, as one batch of the size of the data."""
    return np.asarray(PICK(n, n, key, jnp.int32(number)))


@settings(max_examples=5, deadline=None)
@given(n=st.integers(PERMUTED + 1, 3 * PERMUTED), number=st.integers(0, 10_000))
def test_many_examples_too_are_used_once_per_epoch(n, number):
    np.testing.assert_array_equal(np.sort(epoch(n, number)), np.arange(n))


def test_orders_of_many_examples_look_random():
    n, orders = 5000, np.stack([epoch(5000, number) for number in range(40)])
    # As of random permutations: about one fixed point, no correlation of neighbours, of epochs, or of keys.
    assert 0.4 < (orders == np.arange(n)).sum(1).mean() < 2
    other_key = epoch(n, 0, jax.random.key(4))
    for one, other in ((orders[:, :-1], orders[:, 1:]), (orders[:-1], orders[1:]), (orders[0], other_key)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)
    # Differences of neighbours, which a network of too few rounds repeats.
    steps = np.diff(orders[0]) % n
    assert len(np.unique(steps)) > 0.6 * n
    # Every position has every part of the examples.
    counts = np.apply_along_axis(np.bincount, 0, orders // (n // 4), minlength=4)
    assert abs(np.square(counts - 10).sum(0).mean() / 10 - 3) < 0.2  # chi squared of 3 degrees of freedom


def test_drawing_from_many_examples_is_fast():
    times = []
    for n in (PERMUTED + 1, 40_000):
        PICK(n, 4, KEY, jnp.int32(0)).block_until_ready()
        rounds = []
        for step in range(20):
            begin = time.perf_counter()
            PICK(n, 4, KEY, jnp.int32(step)).block_until_ready()
            rounds.append(time.perf_counter() - begin)
        times.append(min(rounds))
    assert max(times) < 1e-3  # seconds


def examples(n: int, **of_example) -> EncodedExamples:
    mean = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 2, 2, 1))
    index = np.arange(n, dtype=np.int32) % 2
    given = (mean, 0 * mean, {"text": np.float32([[10], [20]])}, index, of_example or None)
    return EncodedExamples(*jax.tree.map(jnp.asarray, given))


def batch_of(data: TrainingData, **kw):
    return jax.jit(lambda step: draw(data, PROCESS, 3, KEY, step, **kw))(jnp.int32(5))


def test_conditions_of_single_examples_come_with_them():
    """In both halves, beside the caption's."""
    halves = [examples(5, ids=100 + np.arange(5)), examples(7, ids=200 + np.arange(7))]
    plain = batch_of(TrainingData(*(half._replace(of_example=None) for half in halves)))
    batch = batch_of(TrainingData(*halves))
    number = np.asarray(batch.x0)[:, 0, 0, 0]
    np.testing.assert_array_equal(batch.cond["ids"], number + np.repeat([100, 200], 3))
    np.testing.assert_array_equal(batch.cond["text"][:, 0], 10 + 10 * (number % 2))
    for one, other in ((batch.x0, plain.x0), (batch.eps, plain.eps), (batch.t, plain.t)):
        np.testing.assert_array_equal(one, other)


def test_augmentation_is_drawn_per_example_and_changes_no_other_draw():
    zeros = np.zeros((7, 2), np.float32)
    data = TrainingData(examples(5, picture=zeros[:5]), examples(7, picture=zeros + 1))

    def augment(cond, key):
        assert cond["picture"].shape == (2,)
        return cond | {"picture": cond["picture"] + jax.random.normal(key, (2,)), "level": jax.random.uniform(key)}

    plain, batch = batch_of(data), batch_of(data, augment=augment)
    for one, other in ((batch.x0, plain.x0), (batch.eps, plain.eps), (batch.t, plain.t)):
        np.testing.assert_array_equal(one, other)
    noise = np.asarray(batch.cond["picture"] - plain.cond["picture"])
    assert batch.cond["level"].shape == (6,) and len(np.unique(batch.cond["level"])) == 6
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(batch_of(data, augment=augment).cond["picture"], batch.cond["picture"])


def test_every_release_draws_the_same():
    """A run that a later release resumes goes on with the examples, noise and times that it would have had."""
    data = TrainingData(examples(5, ids=np.arange(5)), examples(7, ids=np.arange(7)))
    batch = batch_of(data, augment=lambda cond, key: cond | {"level": jax.random.uniform(key)}, dropout=0.5)
    np.testing.assert_array_equal(batch.x0[:, 0, 0, 0], [1, 0, 3, 6, 1, 5])
    np.testing.assert_array_equal(batch.t, [112, 352, 566, 675, 421, 959])
    np.testing.assert_array_equal(batch.cond["text"][:, 0], [20, 10, 20, 20, 20, 20])
    eps = [0.75886965, 0.31020254, -0.5781977, -0.24245313, 1.3820664, 1.4172481]
    np.testing.assert_allclose(batch.eps[:, 0, 0, 0], eps, rtol=1e-5)
    level = [0.9268526, 0.7376796, 0.19912624, 0.12187696, 0.3625846, 0.9455743]
    np.testing.assert_allclose(batch.cond["level"], level, rtol=1e-5)


def test_many_examples_are_ordered_by_the_published_hash():
    """MurmurHash3's own results for an empty string and these seeds."""
    assert [hex(_mixed(jnp.uint32(seed))) for seed in (1, 0xFFFFFFFF)] == ["0x514e28b7", "0x81f16f39"]


def test_room_for_more_examples_changes_no_draw():
    """Copies of the last row are never drawn, and the last condition stays the empty caption's."""
    halves = [examples(5, ids=100 + np.arange(5)), examples(7, ids=200 + np.arange(7))]
    order = ordered(TrainingData(*halves), 3, KEY, 9)
    plain = batch_of(TrainingData(*halves), dropout=0.3)
    for number, half in enumerate(halves):  # rows that are added are recognised by their condition
        halves[number] = with_room(half, 16, 4)
        halves[number].of_example["ids"] = halves[number].of_example["ids"].at[len(half.mean) :].set(-1)
    data = TrainingData(*halves, order)
    jax.tree.map(np.testing.assert_array_equal, batch_of(data, dropout=0.3), plain)


@given(st.integers(1, 10**6))
def test_room_is_of_few_sizes(count):
    rows = room(count)
    assert count <= rows and room(rows) == rows
    assert rows in (16, 64, 256, 1024) if count <= 1024 else rows <= 1.125 * count


def test_conditions_of_single_examples_need_names():
    data = TrainingData(examples(5, ids=np.arange(5))._replace(cond=jnp.zeros((2, 1))), None)
    with pytest.raises(TypeError):
        batch_of(data)
