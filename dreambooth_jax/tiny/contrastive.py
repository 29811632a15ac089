"""Contrastive learning of the embedded base's towers: what a batch holds, and the losses.

CLIP learns which caption belongs to which picture, the ViT which two pictures show the same cut-out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from dreambooth_jax.models.params import Functional, Params


class Pictures(NamedTuple):
    """The rendered data set, or a batch of it.

    Attributes:
        images: [n, h, w, 3] uint8.
        ids: distinct token ids [u, l]; in a batch, each example's [b, l].
        caption: which of the distinct ids each image has, [n].
        sprite: which sprite it shows, [n].
        background: what is behind it, [n].
    """

    images: UInt8[Array, "n h w 3"]
    ids: Int[Array, "u l"]
    caption: Int[Array, "n"]
    sprite: Int[Array, "n"]
    background: Int[Array, "n"]


class Groups(NamedTuple):
    """Pictures sorted by a label: those of label s are `order[first[s] : first[s] + count[s]]`."""

    pictures: Pictures
    order: Int[Array, "n"]
    first: Int[Array, "s"]
    count: Int[Array, "s"]


def group(pictures: Pictures, labels: Int[Array, "n"]) -> Groups:
    """Sorts `pictures` by their `labels`."""
    labels = np.asarray(labels)
    count = np.bincount(labels)
    first = np.cumsum(count) - count
    order = np.argsort(labels, kind="stable")
    return Groups(pictures, *(jnp.asarray(x, jnp.int32) for x in (order, first, count)))


def normalise(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 -> [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def take(pictures: Pictures, index: Int[Array, "b"]) -> Pictures:
    """The batch of the pictures at `index`."""
    caption = pictures.caption[index]
    return Pictures(
        pictures.images[index], pictures.ids[caption], caption, pictures.sprite[index], pictures.background[index]
    )


def draw_any(batch_size: int) -> Callable[[Pictures, Array], Pictures]:
    """Pictures drawn uniformly."""
    return lambda data, key: take(data, jax.random.randint(key, (batch_size,), 0, len(data.images)))


def _member(data: Groups, label: Int[Array, "b"], key: Array) -> Int[Array, "b"]:
    return data.order[data.first[label] + jax.random.randint(key, label.shape, 0, data.count[label])]


def draw_alike(batch_size: int) -> Callable[[Groups, Array], Pictures]:
    """Half of the batches are pictures of one group, those with one background: there only the thing tells a caption
    from the others. Otherwise a tower is content with backgrounds."""

    def draw(data: Groups, key: Array) -> Pictures:
        coin_key, any_key, alike_key = jax.random.split(key, 3)
        everyone = jax.random.randint(any_key, (batch_size,), 0, len(data.pictures.images))
        background = data.pictures.background[everyone[:1]]
        alike = _member(data, jnp.broadcast_to(background, (batch_size,)), alike_key)
        return take(data.pictures, jnp.where(jax.random.bernoulli(coin_key), alike, everyone))

    return draw


def draw_pairs(batch_size: int) -> Callable[[Groups, Array], Pictures]:
    """Half a batch of pictures, then for each another one of its group, the pictures of one sprite."""

    def draw(data: Groups, key: Array) -> Pictures:
        one_key, other_key = jax.random.split(key)
        one = jax.random.randint(one_key, (batch_size // 2,), 0, len(data.pictures.images))
        other = _member(data, data.pictures.sprite[one], other_key)
        return take(data.pictures, jnp.concatenate([one, other]))

    return draw


def clip_loss(clip: Functional, end: int) -> Callable:
    """Symmetric contrastive loss (arXiv 2103.00020, figure 3); equal captions in a batch are no negatives."""

    def loss(params: Params, batch: Pictures, key: Array) -> Array:
        logits = clip.apply(params, batch.ids, normalise(batch.images), end, method="logits")
        same = batch.caption[:, None] == batch.caption[None]
        targets = same / same.sum(1, keepdims=True)
        by_image = optax.softmax_cross_entropy(logits, targets).mean()
        by_text = optax.softmax_cross_entropy(logits.T, targets).mean()
        return (by_image + by_text) / 2

    return loss


def vit_loss(vit: Functional, temperature: float) -> Callable:
    """Tells instances apart (NT-Xent, arXiv 2002.05709, equation 1): two pictures of one cut-out in different places,
    sizes and poses attract each other and repel the others. Colours are never jittered: they are part of a subject."""

    def loss(params: Params, batch: Pictures, key: Array) -> Array:
        features = vit.apply(params, normalise(batch.images), method="features")
        number = jnp.arange(len(features))
        partner = jnp.roll(number, len(features) // 2)
        logits = features @ features.T / temperature
        same = batch.sprite[:, None] == batch.sprite[None]  # its own cut-out once more is no negative
        hidden = same & (number[None] != partner[:, None])
        return optax.softmax_cross_entropy_with_integer_labels(jnp.where(hidden, -1e9, logits), partner).mean()

    return loss
