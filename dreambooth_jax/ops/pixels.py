"""Pixel values: bytes, the models' range [-1, 1], and the range [0, 1] of decoded pictures."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def from_bytes(images: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Bytes to [-1, 1], in float32."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_unit(pixels: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """[-1, 1] to [0, 1]; values outside are clipped."""
    return jnp.clip(pixels / 2 + 0.5, 0.0, 1.0)
