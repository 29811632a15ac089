"""Aspect-ratio buckets: the shapes to which photos are cropped when they need not become squares.

All shapes have about the area of the square that the base was trained for, so that a step takes about its memory and
time (NovelAI's "aspect ratio bucketing", which kohya's scripts and SDXL, arXiv 2307.01952, section 2.3, follow).
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]  # height and width in pixels
_LONGEST = 2  # times the side of the square; the shortest side is its half
_STEPS = 16  # parts of the side of the square: as fine as shapes are


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """The possible shapes, the square first: sides are multiples of `multiple`, areas at most `resolution`^2.

    For every side between a half and twice `resolution`, in steps of the multiple of `multiple` that is not below a
    sixteenth of `resolution` (64 pixels for Stable Diffusion and SDXL), the longest other side.

    Args:
        resolution: side of the square in pixels, a multiple of `multiple`.
        multiple: the base's; see `Pipeline.multiple`.
    """
    step = multiple * max(1, math.ceil(resolution / _STEPS / multiple))
    most = resolution * _LONGEST
    pairs = {(resolution, resolution)}
    for side in range(step * math.ceil(resolution / _LONGEST / step), most + 1, step):
        other = min(most, resolution * resolution // side) // step * step
        if other >= resolution / _LONGEST:
            pairs |= {(side, other), (other, side)}
    return tuple(sorted(pairs, key=lambda pair: (pair[0] != pair[1] or pair[0] != resolution, pair)))


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The shape whose ratio is nearest, so that a crop to it cuts least; of several, the largest."""
    ratio = math.log(height / width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 9), -size[0] * size[1]))


def text_of(size: Size) -> str:
    """Width x height, as image viewers have it."""
    return f"{size[1]} x {size[0]}"
