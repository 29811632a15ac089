"""Masks, caption dropout and shuffled tags: draws of the step's number; without them nothing changes."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.runs import config_of

from dreambooth_jax.data.captions import shuffled_tags
from dreambooth_jax.data.encode import latent_weights
from dreambooth_jax.data.images import read_examples
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, draw
from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
from dreambooth_jax.diffusion.process import flow_process
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs.ahead import expected_data
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.job import data_shapes, key_shape, lower_steps, resident_data, split_shapes, state_shapes
from dreambooth_jax.runs.setup import prepare_data, set_up, training_sizes

OPTIONS = {"template": "a {identifier} {class_noun}", "identifier": "sks", "class_noun": "dog"}


def blobs(width=96, height=64):
    """A picture whose bright half is its own mask."""
    mask = np.zeros((height, width), np.uint8)
    mask[8:40, 20:70] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("kind", ["opacity", "file", "small file"])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(tmp_path, kind):
    mask = blobs()
    picture = mask.convert("RGB")
    if kind == "opacity":
        picture.putalpha(mask)
    else:
        mask.resize((48, 32) if kind == "small file" else mask.size).save(tmp_path / "a-masklabel.png")
    picture.save(tmp_path / "a.png")
    examples = read_examples(tmp_path, 32, **OPTIONS, masked=True, crop="random", flip=True, views=6)
    assert examples.names == ("a.png",) * 6 and examples.masks.shape == (6, 32, 32)
    if kind == "opacity":  # transparent parts lie on white
        assert examples.images.min() == 255
        assert len({mask.tobytes() for mask in examples.masks}) == 6
    else:
        difference = np.abs(examples.masks.astype(int) - examples.images[..., 0])
        assert difference.mean() < (1 if kind == "file" else 12)


def test_a_mask_that_is_missing_empty_or_of_another_shape_is_named(tmp_path):
    blobs().convert("RGB").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no image in .* has a mask"):
        read_examples(tmp_path, 32, **OPTIONS, masked=True)
    Image.new("L", (96, 64)).save(tmp_path / "a-masklabel.png")
    with pytest.raises(ValueError, match=r"a\.png: .*mask is empty"):
        read_examples(tmp_path, 32, **OPTIONS, masked=True)
    Image.new("L", (64, 96), 255).save(tmp_path / "a-masklabel.png")
    with pytest.raises(ValueError, match=r"a\.png: .*mask is 64 x 96, another shape than 96 x 64"):
        read_examples(tmp_path, 32, **OPTIONS, masked=True)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_crop_never_misses_the_mask(tmp_path, crop):
    """A loss over no pixel at all is NaN."""
    for name, size, box in (("wide", (120, 40), (2, 10, 9, 20)), ("tall", (40, 120), (10, 110, 20, 119))):
        opacity = Image.new("L", size)
        opacity.paste(255, box)
        picture = Image.effect_noise(size, 60).convert("RGB")
        picture.putalpha(opacity)
        picture.save(tmp_path / f"{name}.png")
    views = {"views": 6, "flip": True} if crop == "random" else {}
    examples = read_examples(tmp_path, 32, **OPTIONS, masked=True, crop=crop, **views)
    assert examples.masks.any((1, 2)).all()
    assert "crops moved to the masks that lay outside of them: tall.png, wide.png" in examples.notes
    opacity = Image.new("L", (400, 400))
    opacity.putpixel((0, 0), 1)
    opacity.save(tmp_path / "wide-masklabel.png")
    Image.effect_noise((400, 400), 60).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png: its mask is too small to be seen in 32 x 32 pixels"):
        read_examples(tmp_path, 32, **OPTIONS, masked=True)


def test_crops_say_what_they_cut(tmp_path):
    for name, size in {"wide.png": (90, 60), "tall.png": (50, 100), "square.png": (64, 64)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)
    (note,) = read_examples(tmp_path, 32, **OPTIONS).notes
    assert "wide.png (90 x 60) loses 33 % of its width" in note
    assert "tall.png (50 x 100) loses 50 % of its height" in note and "square" not in note.split(":", 1)[1]


def test_tags_change_places_and_the_first_one_stays():
    orders = shuffled_tags("a sks dog, snow , sitting, red collar", 20, seed=0)
    assert {order.split(", ")[0] for order in orders} == {"a sks dog"}
    assert {tuple(sorted(order.split(", "))) for order in orders} == {("a sks dog", "red collar", "sitting", "snow")}
    assert len(set(orders)) > 4
    assert orders == shuffled_tags("a sks dog, snow , sitting, red collar", 20, seed=0)
    assert orders != shuffled_tags("a sks dog, snow , sitting, red collar", 20, seed=1)
    assert set(shuffled_tags("a sks dog", 3, seed=0)) == {"a sks dog"}


PROCESS = flow_process(lambda name, steps: pytest.fail("nothing is sampled"))


def examples(index, weight=None, rows=5):
    latents = jnp.arange(len(index) * 16.0).reshape(-1, 16)
    return EncodedExamples(latents, 0 * latents, {"row": jnp.arange(rows)}, jnp.asarray(index), None, weight)


def drawn(data, step, **options):
    return draw(TrainingData(data, data), PROCESS, 4, jax.random.key(0), jnp.int32(step), (2, 2, 4), **options)


def test_off_they_leave_a_batch_as_it_is():
    plain = drawn(examples([0, 1, 2, 3]), 3)
    for other in (
        drawn(examples([[0], [1], [2], [3]]), 3),
        drawn(examples([0, 1, 2, 3]), 3, dropout=jnp.float32(1e-9)),
    ):
        jax.tree.map(np.testing.assert_array_equal, plain, other)
    assert plain.weight is None


def test_dropout_and_orders_are_draws_of_the_step():
    data = examples([[0, 1]] * 4)
    rows = [np.asarray(drawn(data, step, dropout=0.25).cond["row"]) for step in range(100)]
    count = Counter(np.concatenate(rows).tolist())
    assert count.keys() == {0, 1, 4}
    assert 150 < count[4] < 250 and 240 < count[0] < 360
    np.testing.assert_array_equal(rows[7], drawn(data, 7, dropout=0.25).cond["row"])


def test_the_loss_counts_inside_the_mask_alone():
    inside = np.zeros((2, 4, 4, 1), np.float32)
    inside[:, :2] = 1

    def loss(prediction, weight):
        batch = Batch(jnp.zeros((2, 4, 4, 3)), jnp.ones((2, 4, 4, 3)), jnp.array([300.0, 500.0]), None, weight)
        return dreambooth_loss(lambda params, *_: params, prediction, batch, PROCESS, num_instance=2).loss

    prediction = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    gradient = jax.grad(loss)(prediction, inside)
    assert not gradient[:, 2:].any() and gradient[:, :2].all()
    np.testing.assert_allclose(loss(prediction, inside), jnp.square(prediction[:, :2] - 1).mean(), rtol=1e-6)
    np.testing.assert_allclose(loss(prediction, 0 * inside + 1), loss(prediction, None), rtol=1e-6)


def test_a_latent_pixel_weighs_the_share_that_is_masked():
    mask = np.zeros((1, 4, 8), np.uint8)
    mask[0, :2, :3] = 255
    np.testing.assert_array_equal(latent_weights(mask, (2, 4)), [[1, 0.5, 0, 0, 0, 0, 0, 0]])


@pytest.mark.slow
def test_a_run_with_all_of_them_has_the_shapes_that_plans_have(micro, tmp_path):
    folder, others = tmp_path / "photos", tmp_path / "dogs"
    folder.mkdir()
    others.mkdir()
    for name in "abc":
        picture = Image.effect_noise((40, 30), 60).convert("RGB")
        picture.putalpha(blobs(40, 30).point(lambda v: 255 - v))
        picture.save(folder / f"{name}.png")
        picture.convert("RGB").save(others / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"sks dog, {name}, snow")
    config = config_of(
        tmp_path / "run",
        base=micro,
        instance_images=str(folder),
        class_images=str(others),
        num_class_images=3,
        shuffle_tags=3,
        caption_dropout=0.1,
        masked_loss=True,
    )
    run = set_up(config, jax.devices()[:1])
    (data,) = prepare_data(run, read_params(run.pipeline))
    planned = data_shapes(run.job, len(data.instance.mean), len(data.prior.mean))
    (resident,), _ = resident_data(run.job, [data])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), resident) == jax.tree.map(lambda x: (x.shape, x.dtype), planned)
    expected = expected_data(run, run.examples[0], *training_sizes(run))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), resident) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert data.instance.weight.min() == 0 and data.prior.weight.min() == 1
    trainable, frozen = split_shapes(run.job)
    assert lower_steps(run.job, state_shapes(run.job, trainable), frozen, resident, key_shape(run.job))


def test_where_they_are_not_implemented_they_are_refused(tmp_path):
    config = config_of(tmp_path, shuffle_tags=2, caption_dropout=0.1, masked_loss=True, sr_crop=64)
    config.update(subjects=str(tmp_path), method="lora")
    with pytest.raises(
        ConfigError, match=r"(?s)shuffle_tags, caption_dropout, sr_crop: .*many.*masked_loss: .*sr_crop"
    ):
        check_config(config)
