"""Pairs of low and high resolution, made from photos: examples of a super-resolution stage."""

import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dreambooth_jax.data.images import Examples


def shrink(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> UInt8[np.ndarray, "n rows columns 3"]:
    """The pictures `factor` times smaller, by the same filter (Lanczos) that makes the stage before's own examples."""
    size = images.shape[2] // factor, images.shape[1] // factor
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def cut(examples: Examples, side: int, seed: int) -> Examples:
    """One random square of each example, drawn from (seed, name, place among the views): a stage that enlarges 256
    pixels to 1024 learns on crops of 256 (arXiv 2205.11487, section 2.4).

    Raises:
        ValueError: the examples are smaller than `side`.
    """
    height, width = examples.images.shape[1:3]
    if side > min(height, width):
        raise ValueError(f"sr_crop = {side}: the examples have {width} x {height} pixels; give at most that")
    squares = []
    for number, (image, name) in enumerate(zip(examples.images, examples.names, strict=True)):
        draw = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        top, left = draw.integers(0, height - side + 1), draw.integers(0, width - side + 1)
        squares.append(image[top : top + side, left : left + side])
    return examples._replace(images=np.stack(squares))
