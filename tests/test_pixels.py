"""The embedded cascade's pairs, captions and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.npm_packages import write_packages

from dreambooth_jax.data import low_resolution
from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.families.imagen import enlarging
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.models.params import Functional
from dreambooth_jax.tiny import pixels
from dreambooth_jax.tiny.contrastive import Pictures
from dreambooth_jax.tiny.world import atlas, load_sprites, words, write_unigram

LENGTH = 24
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return load_sprites(write_packages(tmp_path_factory.mktemp("npm")))


@pytest.fixture(scope="module")
def tokenizer(sprites, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_unigram(folder / "tokenizer", words(sprites), LENGTH)
    return load_tokenizer(folder)


def test_every_word_is_one_token_and_sks_the_rarest(tokenizer, sprites):
    for word in words(sprites):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    assert tokenizer.encode("sks") == [len(tokenizer) - 1, tokenizer.eos_token_id]
    assert not check_identifier(tokenizer, "sks") and "common" in check_identifier(tokenizer, "dog")[0]


def test_captions_are_those_that_the_tokenizer_reads(tokenizer, sprites):
    world = atlas.make_atlas(sprites, tokenizer, 32, subject_share=0.5)

    def draw(key):
        labels = atlas.draw_labels(world, key, 100)
        return atlas.caption_ids(world, labels, jax.random.fold_in(key, 1), LENGTH)

    ids = np.asarray(jax.jit(draw)(jax.random.key(0)))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    again = tokenizer(texts, padding="max_length", max_length=LENGTH).input_ids
    np.testing.assert_array_equal(ids, again)
    assert all(len(text.split()) > 1 for text in texts)


def test_pictures_are_made_small_as_photos_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    images[1] = np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None]
    ours, photos = np.asarray(pixels.shrink(jnp.asarray(images), 2)), low_resolution.shrink(images, 2)
    assert np.abs(ours.astype(int) - photos).max() <= 1


@pytest.mark.parametrize("stage", [1, 2])
def test_a_perfect_denoiser_has_no_loss(stage):
    """Stage II is given the same picture made small, apart from noise of the level that it is told."""
    images = jnp.broadcast_to(jnp.asarray([32, 128, 224], jnp.uint8), (8, 16, 16, 3))
    noise = process_from_scheduler(SCHEDULE)
    low = enlarging(SCHEDULE, 2, 100) if stage == 2 else None
    seen = []

    def predict(params, x, t, states, level):
        xt, x0 = x[..., :3], images[:, : x.shape[1], : x.shape[1]] / 127.5 - 1
        alpha, sigma = (f(t.astype(int))[:, None, None, None] for f in (noise.alpha, noise.sigma))
        if low is not None:
            spread = (x[..., 3:] - jnp.sqrt(1 - low.sigma[level.astype(int)] ** 2)[:, None, None, None] * x0).std(
                (1, 2, 3)
            )
            seen.append((spread, low.sigma[np.asarray(level, int)]))
        v = alpha * (xt - alpha * x0) / sigma - sigma * x0
        return jnp.concatenate([v, jnp.full_like(v, 99)], -1)

    unet = Functional(shapes={}, init=None, apply=predict)
    text = Functional(shapes={}, init=None, apply=lambda params, ids: ids)
    texts = pixels.Texts(text, (0,) * LENGTH, 0.5)
    batch = Pictures(images, jnp.ones((8, LENGTH), jnp.int32), jnp.zeros(8, jnp.int32))
    loss = pixels.pixel_loss(unet, texts, noise, factor=2, low=low)({}, batch, jax.random.key(0))
    assert float(loss) < 1e-4
    for spread, sigma in seen:
        np.testing.assert_allclose(spread, sigma, rtol=0.1, atol=0.01)
