"""From image files to the resident training data: everything encoded once, before the first step."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dreambooth_jax.data.images import Examples
from dreambooth_jax.devices.sharding import replicated
from dreambooth_jax.diffusion.step import EncodedExamples
from dreambooth_jax.families.pipeline import Pipeline
from dreambooth_jax.models.params import Params


def make_encoder(pipeline: Pipeline, mesh: Mesh, *, text_states: bool, batch_size: int = 8):
    """Builds `encode(params, examples) -> EncodedExamples`, flat latents on every device of the mesh.

    Args:
        text_states: cache the frozen text encoder's states; otherwise the data hold token ids, to train it on.
        batch_size: images in the autoencoder at a time.
    """
    encode_images = jax.jit(pipeline.encode_images, out_shardings=replicated(mesh))
    encode_text = jax.jit(pipeline.encode_text, out_shardings=replicated(mesh))

    def encode(params: Params, examples: Examples) -> EncodedExamples:
        mean, std = _in_batches(lambda part: encode_images(params, part), examples.images, batch_size)
        captions, caption = np.unique(examples.captions, return_inverse=True)
        cond = pipeline.tokenize(captions.tolist())
        if text_states:
            (cond,) = _in_batches(lambda part: (encode_text(params, part),), cond, batch_size)
        mean, std = (x.reshape(len(x), -1) for x in (mean, std))
        return jax.device_put(EncodedExamples(mean, std, cond, caption.astype(np.int32)), replicated(mesh))

    return encode


def _in_batches(function, rows: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """Applies `function` (rows -> tuple of arrays) to equal batches: one compiled shape for any number of rows."""
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % size, axis=0)])
    parts = [jax.device_get(function(padded[i : i + size])) for i in range(0, len(padded), size)]
    return [np.concatenate(column)[: len(rows)] for column in zip(*parts, strict=True)]
