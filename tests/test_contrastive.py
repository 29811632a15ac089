"""Contrastive batches hold what their losses need, and the losses fall where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreambooth_jax.models.params import Functional
from dreambooth_jax.tiny import contrastive


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    n = 60
    return contrastive.Pictures(
        images=jnp.asarray(rng.integers(0, 256, (n, 4, 4, 3)), jnp.uint8),
        ids=jnp.arange(20)[:, None].repeat(3, 1),
        caption=jnp.asarray(rng.integers(0, 20, n), jnp.int32),
        sprite=jnp.asarray(rng.permutation(n) % 7, jnp.int32),
        background=jnp.asarray(rng.permutation(n) % 3, jnp.int32),
    )


def test_groups_hold_every_picture_once_under_its_label(pictures):
    groups = contrastive.group(pictures, pictures.sprite)
    assert sorted(np.asarray(groups.order)) == list(range(60))
    for label in range(7):
        members = groups.order[groups.first[label] :][: groups.count[label]]
        assert set(np.asarray(pictures.sprite[members])) == {label}


def test_half_of_the_batches_have_one_background(pictures):
    draw = jax.jit(contrastive.draw_alike(16))
    groups = contrastive.group(pictures, pictures.background)
    batches = [draw(groups, jax.random.key(i)) for i in range(60)]
    alike = [len(set(np.asarray(batch.background))) == 1 for batch in batches]
    assert 0.3 < np.mean(alike) < 0.7
    assert {int(batch.background[0]) for batch, one in zip(batches, alike, strict=True) if one} == {0, 1, 2}
    for batch in batches[:5]:  # each example is a whole picture: its caption's ids are its own
        np.testing.assert_array_equal(batch.ids[:, 0], batch.caption)


def test_pairs_show_one_sprite(pictures):
    batch = jax.jit(contrastive.draw_pairs(16))(contrastive.group(pictures, pictures.sprite), jax.random.key(0))
    np.testing.assert_array_equal(batch.sprite[:8], batch.sprite[8:])
    assert len(set(np.asarray(batch.sprite))) > 2
    assert not np.array_equal(batch.images[:8], batch.images[8:])


def batch_of(captions, sprites):
    n = len(captions)
    return contrastive.Pictures(
        jnp.zeros((n, 2, 2, 3), jnp.uint8), jnp.zeros((n, 1), jnp.int32), jnp.asarray(captions), jnp.asarray(sprites),
        jnp.zeros(n, jnp.int32),
    )  # fmt: skip


def test_clip_is_content_when_equal_captions_share_their_pictures():
    """Two pictures of one caption: as likely for it as each other, and the loss is then the entropy of that choice."""
    logits = 40.0 * jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    clip = Functional({}, None, lambda params, *args, method: logits)
    loss = contrastive.clip_loss(clip, end=0)({}, batch_of([4, 4, 5], [0, 1, 2]), jax.random.key(0))
    assert float(loss) == pytest.approx(2 / 3 * np.log(2), rel=1e-5)
    wrong = Functional({}, None, lambda params, *args, method: logits[::-1])
    assert float(contrastive.clip_loss(wrong, end=0)({}, batch_of([4, 4, 5], [0, 1, 2]), jax.random.key(0))) > 10


def test_the_vit_is_content_when_partners_agree_and_others_do_not():
    partners = jnp.eye(4)[jnp.asarray([0, 1, 0, 1])]
    vit = Functional({}, None, lambda params, *args, method: partners)
    loss = contrastive.vit_loss(vit, temperature=0.01)
    assert float(loss({}, batch_of([0] * 4, [5, 6, 5, 6]), jax.random.key(0))) < 1e-3
    same = Functional({}, None, lambda params, *args, method: jnp.ones((4, 4)) / 2)
    assert float(contrastive.vit_loss(same, 0.01)({}, batch_of([0] * 4, [5, 6, 5, 6]), jax.random.key(0))) > 0.5
