"""Pictures to the normalised pixels that published image models read, as PIL resizes them: antialiased, on uint8."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "_ _ 3"]
Colour = tuple[float, float, float]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Transform(NamedTuple):
    """What an image model's pictures go through.

    Attributes:
        resize: the shorter side in pixels, the aspect ratio kept; 0 for a square of side `crop`.
        crop: the side of the centre crop in pixels.
        resampling: "bicubic" or "bilinear".
        mean, std: of each channel, for values in [0, 1].
    """

    resize: int
    crop: int
    resampling: str
    mean: Colour
    std: Colour

    def __str__(self) -> str:
        size = f"short side {self.resize}" if self.resize else f"squashed to {self.crop}"
        return f"{size} {self.resampling}, crop {self.crop}"


def dino_official(size: int = 224) -> Transform:
    """The transform of DINO's and DINOv2's own evaluation: short side 8/7 of the crop."""
    return Transform(round(size * 256 / 224), size, "bicubic", *IMAGENET)


def dino_hub(size: int = 224) -> Transform:
    """The preprocessor of the hub's facebook/dino-vits16: squashed to a square, bilinear."""
    return Transform(0, size, "bilinear", *IMAGENET)


def clip_official(size: int = 224) -> Transform:
    """CLIP's own transform, and the hub's."""
    return Transform(size, size, "bicubic", *CLIP)


def square(size: int) -> Transform:
    """A square of `size`, values in [-1, 1]: LPIPS, EfficientNet-Lite and the models beside the embedded base."""
    return Transform(size, size, "bicubic", *HALF)


def prepare(transform: Transform, pictures: Sequence[Picture]) -> Float[np.ndarray, "n h w 3"]:
    """Resized, cropped, normalised pixels, float32; the pictures may differ in size.

    Raises:
        ValueError: no pictures.
    """
    if not len(pictures):
        raise ValueError("no pictures to prepare")
    pixels = np.stack([_resized(transform, picture) for picture in pictures]).astype(np.float32) / 255
    return (pixels - np.asarray(transform.mean, np.float32)) / np.asarray(transform.std, np.float32)


def _resized(transform: Transform, picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    side, shorter = transform.crop, min(height, width)
    target = (
        [int(transform.resize * length / shorter) for length in (width, height)] if transform.resize else [side] * 2
    )
    image = Image.fromarray(picture)
    if target != [width, height]:
        image = image.resize(target, Image.Resampling[transform.resampling.upper()])
    left, top = ((length - side) // 2 for length in target)
    return np.asarray(image.crop((left, top, left + side, top + side)))
