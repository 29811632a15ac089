"""Contrastive batches hold what their losses need, and the losses fall where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.npm_packages import write_packages
from transformers import CLIPTokenizer

from dreambooth_jax.models.params import Functional
from dreambooth_jax.tiny import contrastive
from dreambooth_jax.tiny.world import atlas, load_sprites, words, write_tokenizer

VIEW = contrastive.View(16, 16, 24)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    sprites = load_sprites(write_packages(tmp_path_factory.mktemp("npm")))
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), words(sprites)))
    return atlas.make_atlas(sprites, tokenizer, VIEW.size, subject_share=0.5)


@pytest.mark.slow
def test_pairs_show_one_individual_in_two_pictures(world):
    batch = jax.jit(contrastive.draw_pairs(VIEW))(world, jax.random.key(0))
    np.testing.assert_array_equal(batch.individual[:8], batch.individual[8:])
    assert len(set(np.asarray(batch.individual))) > 2
    assert not (np.asarray(batch.images[:8]) == np.asarray(batch.images[8:])).all((1, 2, 3)).any()


@pytest.mark.slow
def test_half_of_the_batches_have_one_background(world):
    """Corners of pictures of one plain colour agree up to their light."""
    draw = jax.jit(contrastive.draw_alike(VIEW))
    spread = [np.asarray(draw(world, jax.random.key(i)).images[:, 0, 0]).astype(float).std(0).mean() for i in range(40)]
    assert 0.25 < np.mean(np.array(spread) < 45) < 0.75


def batch_of(captions, individuals):
    n = len(captions)
    return contrastive.Pictures(
        jnp.zeros((n, 2, 2, 3), jnp.uint8), jnp.asarray(captions)[:, None], jnp.asarray(individuals)
    )


def test_clip_is_content_when_equal_captions_share_their_pictures():
    """Two pictures of one caption: as likely for it as each other, and the loss is then the entropy of that choice."""
    logits = 40.0 * jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    clip = Functional({}, None, lambda params, *args, method: logits)
    loss = contrastive.clip_loss(clip, end=0)({}, batch_of([4, 4, 5], [0, 1, 2]), jax.random.key(0))
    assert float(loss) == pytest.approx(2 / 3 * np.log(2), rel=1e-5)
    wrong = Functional({}, None, lambda params, *args, method: logits[::-1])
    assert float(contrastive.clip_loss(wrong, end=0)({}, batch_of([4, 4, 5], [0, 1, 2]), jax.random.key(0))) > 10


@pytest.mark.slow
def test_the_vit_is_content_when_partners_agree_and_others_do_not():
    partners = jnp.eye(4)[jnp.asarray([0, 1, 0, 1])]
    vit = Functional({}, None, lambda params, *args, method: partners)
    loss = contrastive.vit_loss(vit, temperature=0.01)
    assert float(loss({}, batch_of([0] * 4, [5, 6, 5, 6]), jax.random.key(0))) < 1e-3
    same = Functional({}, None, lambda params, *args, method: jnp.ones((4, 4)) / 2)
    assert float(contrastive.vit_loss(same, 0.01)({}, batch_of([0] * 4, [5, 6, 5, 6]), jax.random.key(0))) > 0.5
