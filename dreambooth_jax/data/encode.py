"""From image files to the resident training data: everything encoded once, before the first step."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, PyTree, UInt8

from dreambooth_jax.data.captions import shuffled_tags
from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.latents import Latents, Moments
from dreambooth_jax.data.low_resolution import shrink
from dreambooth_jax.devices.sharding import replicated
from dreambooth_jax.diffusion.examples import EncodedExamples
from dreambooth_jax.families.family import Images, Pictures
from dreambooth_jax.families.pipeline import Pipeline
from dreambooth_jax.models.params import Params

Encoder = Callable[..., EncodedExamples]


def make_encoder(
    pipeline: Pipeline,
    mesh: Mesh,
    *,
    text_states: bool,
    batch_size: int = 8,
    orders: int = 0,
    with_empty: bool = False,
    seed: int = 0,
) -> Encoder:
    """Builds `encode(params, examples, latents=None) -> EncodedExamples`, flat examples on every device of the mesh.
    With `Latents`, pictures that are kept there are not encoded, and the others are kept.

    Args:
        text_states: cache the conditions of frozen text encoders; otherwise the data hold tokens, to train these.
        batch_size: images in the autoencoder at a time.
        orders: number of orders of each caption's tags, one drawn per step; 0: the captions as they are.
        with_empty: the empty caption as last condition, for caption dropout.
        seed: of the orders.
    """
    encode_images = jax.jit(pipeline.encode_images, out_shardings=replicated(mesh))
    of_pictures = jax.jit(pipeline.of_example, out_shardings=replicated(mesh))
    encode_text = jax.jit(pipeline.encode_text, out_shardings=replicated(mesh))

    def encode(params: Params, examples: Examples, latents: Latents | None = None) -> EncodedExamples:
        def moments(images: Images) -> Moments:
            return in_batches(lambda part: encode_images(params, part), images, batch_size)

        mean, std = moments(examples.images) if latents is None else latents.of(examples.images, moments)
        captions, caption = distinct_captions(examples, orders, seed)
        cond = pipeline.tokenize(captions + [""] * with_empty)
        if text_states:
            cond = in_batches(lambda part: encode_text(params, part), cond, batch_size)
        weight = None if examples.masks is None else latent_weights(examples.masks, mean.shape[1:-1])
        mean, std = (x.reshape(len(x), -1) for x in (mean, std))
        of_example = in_batches(of_pictures, pictures(pipeline, examples), batch_size) or None
        encoded = EncodedExamples(mean, std, cond, caption, of_example, weight)
        return jax.device_put(encoded, replicated(mesh))

    return encode


def distinct_captions(
    examples: Examples, orders: int, seed: int
) -> tuple[list[str], Int[np.ndarray, "n"] | Int[np.ndarray, "n k"]]:
    """(all different captions, number of each example's); with `orders` of tags, those of each; see `make_encoder`."""
    texts: Sequence[str] | list[list[str]] = examples.captions
    if orders:
        texts = [shuffled_tags(text, orders, seed) for text in examples.captions]
    captions, caption = np.unique(texts, return_inverse=True)
    return captions.tolist(), caption.astype(np.int32)


def latent_weights(masks: UInt8[np.ndarray, "n h w"], grid: tuple[int, int]) -> Float[np.ndarray, "n p"]:
    """The share of every latent pixel that the mask covers, flat; images are a multiple of the grid."""
    n, h, w = masks.shape
    blocks = masks.reshape(n, grid[0], h // grid[0], grid[1], w // grid[1])
    return (blocks.mean((2, 4), dtype=np.float32) / 255).reshape(n, -1)


def pictures(pipeline: Pipeline, examples: Examples) -> Pictures:
    """What the examples are conditioned on: their sizes and, in a super-resolution stage, themselves made small."""
    low = pipeline.low_resolution
    small = None if low is None else shrink(examples.images, low.factor)
    target = np.full((len(examples.images), 2), examples.images.shape[1:3], np.int32)
    return Pictures(small, examples.original, examples.crop, target)


def in_batches(function: Callable[[PyTree], PyTree], rows: PyTree, size: int) -> PyTree:
    """Applies `function` to equal batches of the rows of a pytree: one compiled shape for any number of rows.

    Args:
        function: pytree with leading axis `size` -> pytree with leading axis `size`.
        rows: pytree of arrays with one leading axis.
    """
    count = len(jax.tree.leaves(rows)[0])
    padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], -count % size, axis=0)]), rows)
    starts = range(0, count, size)
    parts = [jax.device_get(function(jax.tree.map(lambda x: x[i : i + size], padded))) for i in starts]  # noqa: B023
    return jax.tree.map(lambda *column: np.concatenate(column)[:count], *parts)
