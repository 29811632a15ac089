"""Words that no caption of the world has, in the embedded cascade's T5: an identifier of a subject must leave a mark.

T5 learns from text alone, by restoring words, and so keeps every word apart (arXiv 1910.10683). One that is trained
with a denoiser on captions of 500 words drops all others, "sks" among them. Here a copy of it learns to read captions
as before, and to give a rare word a state of its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreambooth_jax.models.params import Functional, Params, under_prefix
from dreambooth_jax.tiny.world.atlas import Atlas, caption_ids, draw_labels

MOST = 3  # rare tokens in a row: an identifier may have several
LAST_NORM = "encoder.final_layer_norm.scale"
LOUD = 8  # factor of the rare words' vectors at the start: what is added to them layer by layer then changes little


def rare_tokens(atlas: Atlas, vocabulary: int, special: int) -> tuple[int, ...]:
    """The tokens that are in no caption.

    Args:
        vocabulary: number of tokens.
        special: number of the first ones that are no words.
    """
    phrases = (atlas.medium, atlas.thing, atlas.place)
    known = {int(token) for part in phrases for token in np.unique(part.ids)}
    return tuple(token for token in range(special, vocabulary) if token not in known)


def louder(text: Params, rare: tuple[int, ...]) -> Params:
    """T5 with the vectors of the rare tokens made longer."""
    table = np.array(text["shared.embedding"])
    table[list(rare)] *= LOUD
    return text | {"shared.embedding": jnp.asarray(table)}


def draw_captions(count: int, length: int) -> Callable[[Atlas, Array], Int[Array, "b l"]]:
    """Token ids of captions as the world's probabilities have them."""

    def draw(atlas: Atlas, key: Array) -> Int[Array, "b l"]:
        label_key, caption_key = jax.random.split(key)
        return caption_ids(atlas, draw_labels(atlas, label_key, count), caption_key, length)

    return draw


def rare_loss(
    encoder: Functional, rare: tuple[int, ...], empty: tuple[int, ...], unconditional: float, pad: int
) -> Callable[[Params, Array, Array], Array]:
    """||s - s*||^2 / ||s*||^2 over all tokens, and once more over those that are no padding.

    s* are the states of the caption without rare words, one after the other; that of a rare word is what the last norm
    makes of its vector alone. Half of the captions have none.

    Args:
        encoder: T5: "before." in the parameters, which stays, and "text_encoder.".
        rare: the tokens to insert.
        empty: token ids of the empty caption.
        unconditional: share of empty captions.
        pad: the padding token.
    """

    def loss(params: Params, ids: Int[Array, "b l"], key: Array) -> Float[Array, ""]:
        word_key, number_key, place_key, drop_key = jax.random.split(key, 4)
        batch, length = ids.shape
        ids = jnp.where(jax.random.bernoulli(drop_key, unconditional, (batch, 1)), jnp.asarray(empty), ids)
        drawn = jnp.asarray(rare)[jax.random.randint(word_key, (batch, MOST), 0, len(rare))]
        number = jnp.maximum(jax.random.randint(number_key, (batch, 1), 1 - MOST, MOST + 1), 0)
        written = (ids != pad).sum(1, keepdims=True)  # its end included
        place = jnp.floor(jax.random.uniform(place_key, (batch, 1)) * written).astype(jnp.int32)
        position = jnp.arange(length)[None]
        inserted = (position >= place) & (position < place + number)
        source = jnp.where(position < place, position, jnp.maximum(position - number, 0))
        word = jnp.take_along_axis(drawn, jnp.clip(position - place, 0, MOST - 1), axis=1)
        longer = jnp.where(inserted, word, jnp.take_along_axis(ids, source, axis=1))

        before = under_prefix("before.", params)
        states = encoder.apply(before, ids)
        vectors = before["shared.embedding"][word]
        own = before[LAST_NORM] * vectors * jax.lax.rsqrt(jnp.square(vectors).mean(-1, keepdims=True))
        wanted = jnp.where(inserted[..., None], own, jnp.take_along_axis(states, source[..., None], axis=1))
        found = encoder.apply(under_prefix("text_encoder.", params), longer)
        error = jnp.square(found - jax.lax.stop_gradient(wanted)).sum(-1) / jnp.square(states).sum(-1).mean()
        words = longer != pad
        return error.mean() + (error * words).sum() / words.sum()

    return loss
