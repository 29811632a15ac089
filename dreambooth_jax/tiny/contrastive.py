"""Batches of composed pictures, and contrastive losses of the embedded base's towers.

CLIP learns which caption belongs to which picture, the ViT which two pictures show the same individual.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from dreambooth_jax.models.params import Functional, Params
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny.world.atlas import Atlas, Labels, caption_ids, compose, draw_labels


class Pictures(NamedTuple):
    """A batch of pictures.

    Attributes:
        images: [b, h, w, 3] uint8.
        ids: token ids of each caption [b, l].
        individual: number of the individual that each shows [b].
    """

    images: UInt8[Array, "b h w 3"]
    ids: Int[Array, "b l"]
    individual: Int[Array, "b"]


class View(NamedTuple):
    """Sizes of a batch: number of pictures, their side in pixels, tokens of a caption."""

    count: int
    size: int
    length: int


Loss = Callable[[Params, Pictures, Array], Float[Array, ""]]


def _pictures(atlas: Atlas, labels: Labels, key: Key[Array, ""], view: View) -> Pictures:
    picture_key, caption_key = jax.random.split(key)
    ids = caption_ids(atlas, labels, caption_key, view.length)
    return Pictures(compose(atlas, labels, picture_key, view.size), ids, atlas.individual[labels.sprite])


def draw_any(view: View) -> Callable[[Atlas, Array], Pictures]:
    """Pictures as the world's probabilities have them."""

    def draw(atlas: Atlas, key: Array) -> Pictures:
        label_key, key = jax.random.split(key)
        return _pictures(atlas, draw_labels(atlas, label_key, view.count), key, view)

    return draw


def draw_alike(view: View) -> Callable[[Atlas, Array], Pictures]:
    """Half of the batches have one background: there only the thing tells a caption from the others. Otherwise a tower
    is content with backgrounds."""

    def draw(atlas: Atlas, key: Array) -> Pictures:
        label_key, coin_key, key = jax.random.split(key, 3)
        labels = draw_labels(atlas, label_key, view.count)
        one = jnp.broadcast_to(labels.background[:1], (view.count,))
        alike = labels._replace(background=one, colours=jnp.broadcast_to(labels.colours[:1], (view.count, 2)))
        chosen = jax.tree.map(lambda a, b: jnp.where(jax.random.bernoulli(coin_key), a, b), alike, labels)
        return _pictures(atlas, chosen, key, view)

    return draw


def draw_pairs(view: View) -> Callable[[Atlas, Array], Pictures]:
    """Half a batch of pictures, then for each another one of its individual, in a pose and a place of its own."""

    def draw(atlas: Atlas, key: Array) -> Pictures:
        one_key, pose_key, other_key, key = jax.random.split(key, 4)
        one = draw_labels(atlas, one_key, view.count // 2)
        same = atlas.individual[None] == atlas.individual[one.sprite][:, None]
        sprite = jax.random.categorical(pose_key, jnp.where(same, 0.0, -jnp.inf))
        other = draw_labels(atlas, other_key, view.count // 2, sprite)
        return _pictures(atlas, jax.tree.map(lambda *x: jnp.concatenate(x), one, other), key, view)

    return draw


def clip_loss(clip: Functional, end: int) -> Loss:
    """Symmetric contrastive loss (arXiv 2103.00020, figure 3); equal captions in a batch are no negatives."""

    def loss(params: Params, batch: Pictures, key: Array) -> Float[Array, ""]:
        logits = clip.apply(params, batch.ids, from_bytes(batch.images), end, method="logits")
        same = (batch.ids[:, None] == batch.ids[None]).all(-1)
        targets = same / same.sum(1, keepdims=True)
        by_image = optax.softmax_cross_entropy(logits, targets).mean()
        by_text = optax.softmax_cross_entropy(logits.T, targets).mean()
        return (by_image + by_text) / 2

    return loss


def vit_loss(vit: Functional, temperature: float) -> Loss:
    """Tells individuals apart (NT-Xent, arXiv 2002.05709, equation 1): two pictures of one individual in different
    places, sizes and poses attract each other and repel the others. Colours are never jittered: they are part of a
    subject."""

    def loss(params: Params, batch: Pictures, key: Array) -> Float[Array, ""]:
        features = vit.apply(params, from_bytes(batch.images), method="features")
        number = jnp.arange(len(features))
        partner = jnp.roll(number, len(features) // 2)
        logits = features @ features.T / temperature
        same = batch.individual[:, None] == batch.individual[None]  # one more picture of it is no negative
        hidden = same & (number[None] != partner[:, None])
        return optax.softmax_cross_entropy_with_integer_labels(jnp.where(hidden, -1e9, logits), partner).mean()

    return loss
