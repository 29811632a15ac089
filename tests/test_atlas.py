"""Pictures and captions composed on the device are those of the world as PIL and the host draw it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.npm_packages import write_packages
from transformers import CLIPTokenizer

from dreambooth_jax.tiny.world import BACKGROUNDS, COLOURS, atlas, load_sprites, render, words, write_tokenizer
from dreambooth_jax.tiny.world.captions import media, places, things
from dreambooth_jax.tiny.world.dataset import sprite_weights
from dreambooth_jax.tiny.world.scenes import place

SIZE, LENGTH = 32, 24


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return load_sprites(write_packages(tmp_path_factory.mktemp("npm")))


@pytest.fixture(scope="module")
def tokenizer(sprites, tmp_path_factory):
    return CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), words(sprites)))


@pytest.fixture(scope="module")
def world(sprites, tokenizer):
    return atlas.make_atlas(sprites, tokenizer, SIZE, subject_share=0.5)


@pytest.fixture(scope="module")
def batch(world):
    def draw(key):
        label_key, picture_key, caption_key = jax.random.split(key, 3)
        labels = atlas.draw_labels(world, label_key, 400)
        pictures = atlas.compose(world, labels, picture_key, SIZE)
        return labels, pictures, atlas.caption_ids(world, labels, caption_key, LENGTH)

    return jax.tree.map(np.asarray, jax.jit(draw)(jax.random.key(0)))


@pytest.mark.parametrize(("name", "angle", "mirror"), [("teapot/3d", 0.0, False), ("dog2/3d/pose1", 25.0, True)])
def test_a_sprite_lies_where_pil_puts_it(world, sprites, name, angle, mirror):
    number = [sprite.name for sprite in sprites].index(name)
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    expected = place(black, sprites[number], 0.8, 0.45, 0.55, angle, mirror, shadow=False).astype(float)
    stand = [jnp.asarray(value) for value in (0.8, 0.45, 0.55, np.radians(angle), mirror)]
    layer = atlas._layer(world, jnp.asarray(number), *stand, SIZE)
    error = np.abs(np.asarray(layer)[..., :3] - expected)
    assert expected.max() > 100
    assert error.mean() < 2 and np.percentile(error, 95) < 8  # half a pixel of rounding of a small sprite's frame


def test_sprites_come_up_as_often_as_on_the_host(batch, sprites):
    labels, _, _ = batch
    wanted = sprite_weights(sprites, 0.5)
    dogs = np.array([sprite.noun == "dog" for sprite in sprites])
    assert dogs[labels.sprite].mean() == pytest.approx(wanted[dogs].sum(), abs=0.08)


def test_pictures_look_like_those_of_the_host(batch, sprites):
    """The mean picture and the spread of each pixel: where things stand, and how bright all is."""
    expected, _, _, _ = render(sprites, 400, SIZE, seed=1)
    for statistic in (np.mean, np.std):
        ours, theirs = (statistic(images.astype(float), axis=0).mean(-1) for images in (batch[1], expected))
        assert np.abs(ours - theirs).mean() < 8
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.6 or statistic is np.std


def test_captions_are_those_of_the_grammar(batch, sprites, tokenizer):
    """Each is one that the host's grammar has for this sprite and this background, in the tokenizer's own ids."""
    labels, _, ids = batch
    names = tuple(COLOURS)
    silent = 0
    for row, number, background, colours in zip(ids, *labels, strict=True):
        sprite, name = sprites[number], BACKGROUNDS[background]
        pair = tuple(names[i] for i in colours) if name == "gradient" else (name,)
        texts = {
            " ".join(filter(None, parts))
            for parts in itertools.product(media(sprite.style), things(sprite), places(name, pair))
        }
        encoded = tokenizer(sorted(texts), padding="max_length", max_length=LENGTH).input_ids
        assert row.tolist() in encoded
        silent += row.tolist() in tokenizer(sorted(things(sprite)), padding="max_length", max_length=LENGTH).input_ids
    assert 0.02 < silent / len(ids) < 0.16  # a bare name: half of the media times a sixth of the places


def test_a_gradient_passes_between_the_colours_of_its_caption(world):
    labels = atlas.Labels(jnp.asarray([0]), jnp.asarray([atlas.GRADIENT]), jnp.asarray([[0, 5]]))
    picture = np.asarray(atlas._background(world, jax.tree.map(lambda x: x[0], labels), jax.random.key(3), SIZE))
    ends = picture.reshape(-1, 3)
    for colour in ("red", "blue"):
        assert np.abs(ends - np.asarray(COLOURS[colour])).sum(-1).min() < 60
