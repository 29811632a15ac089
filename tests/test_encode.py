"""Encoded examples: every row is what its photo and its caption give alone, whatever else is in its batch."""

import jax
import numpy as np
import pytest

from dreambooth_jax.data.encode import in_batches, make_encoder
from dreambooth_jax.data.images import Examples
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params

CAPTIONS = ("a, b, c, d, e", "f", "a, b, c, d, e", "g")


@pytest.fixture(scope="module")
def base(micro):
    pipeline = load_pipeline(micro)
    return pipeline, read_params(pipeline)


@pytest.fixture
def examples():
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    sizes = np.zeros((4, 2), np.int32)
    return Examples(images, CAPTIONS, ("a", "b", "c", "d"), sizes, sizes)


def encoded(base, examples, **options):
    pipeline, params = base
    return make_encoder(pipeline, make_mesh(1, 1, jax.devices()[:1]), batch_size=3, **options)(params, examples)


def rows_of(data, number):
    """The conditions that example `number` may be given."""
    return [jax.tree.map(lambda x: x[row], data.cond) for row in np.ravel(data.cond_index[number])]  # noqa: B023


@pytest.mark.parametrize("text_states", [True, False])
def test_every_example_has_its_own_photo_and_its_own_caption(base, examples, text_states):
    """Four examples in batches of three: the rows that fill up the last batch are gone."""
    pipeline, params = base
    data = encoded(base, examples, text_states=text_states)
    assert len(data.mean) == len(data.std) == len(data.cond_index) == 4
    for number, (image, caption) in enumerate(zip(examples.images, CAPTIONS, strict=True)):
        mean, std = pipeline.encode_images(params, image[None])
        np.testing.assert_allclose(data.mean[number], np.ravel(mean), atol=1e-5)
        np.testing.assert_allclose(data.std[number], np.ravel(std), atol=1e-5)
        cond = pipeline.tokenize([caption])
        cond = pipeline.encode_text(params, cond) if text_states else cond
        (row,) = rows_of(data, number)
        jax.tree.map(lambda own, alone: np.testing.assert_allclose(own, alone[0], atol=1e-5), row, dict(cond))


def test_equal_captions_are_stored_once_and_the_empty_one_last(base, examples):
    pipeline, _ = base
    plain, dropped = (encoded(base, examples, text_states=False, with_empty=empty) for empty in (False, True))
    (ids,) = jax.tree.leaves(plain.cond)
    assert len(ids) == 3 and plain.cond_index[0] == plain.cond_index[2]
    (with_empty,) = jax.tree.leaves(dropped.cond)
    np.testing.assert_array_equal(with_empty[:-1], ids)
    np.testing.assert_array_equal(with_empty[-1:], *jax.tree.leaves(pipeline.tokenize([""])))


def test_orders_of_tags_belong_to_their_caption(base, examples):
    pipeline, _ = base
    data = encoded(base, examples, text_states=False, orders=4, seed=1)
    assert data.cond_index.shape == (4, 4)
    for number, caption in enumerate(CAPTIONS):
        own = sorted(np.ravel(*jax.tree.leaves(pipeline.tokenize([caption]))))
        rows = [np.ravel(*jax.tree.leaves(row)) for row in rows_of(data, number)]
        assert all(sorted(row) == own for row in rows)
    orders = {tuple(row) for row in map(np.ravel, jax.tree.leaves(rows_of(data, 0)))}
    assert len(orders) > 1
    other = encoded(base, examples, text_states=False, orders=4, seed=2)
    assert {tuple(row) for row in map(np.ravel, jax.tree.leaves(rows_of(other, 0)))} != orders


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_batches_have_one_size_and_no_row_is_lost(count):
    sizes = []

    def double(rows):
        sizes.append(len(rows["x"]))
        return {"y": rows["x"] * 2, "z": rows["x"][:, None]}

    done = in_batches(double, {"x": np.arange(count)}, 3)
    assert set(sizes) == {3} and len(sizes) == -(-count // 3)
    np.testing.assert_array_equal(done["y"], 2 * np.arange(count))
    np.testing.assert_array_equal(done["z"], np.arange(count)[:, None])
