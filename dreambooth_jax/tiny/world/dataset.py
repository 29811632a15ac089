"""The data set: pictures rendered on the fly, each a function of (split, seed, index) alone."""

import zlib

import numpy as np
from jaxtyping import Float, Int32, UInt8

from dreambooth_jax.tiny.world import scenes
from dreambooth_jax.tiny.world.captions import caption
from dreambooth_jax.tiny.world.names import COLOURS, SUBJECT_NOUNS
from dreambooth_jax.tiny.world.sprites import Sprite

_FLAT_SHARE = 0.12
_PLAIN, _GRADIENT = 0.45, 0.1  # shares of plain and gradient backgrounds; settings share the rest


def sprite_weights(sprites: list[Sprite], subject_weight: float) -> Float[np.ndarray, "s"]:
    """Probability of each sprite.

    Within a style a class counts by the square root of its number of pictures (all its dyed ones as two at most), and
    `subject_weight` times as much if it is one of SUBJECT_NOUNS. Its pictures share that, the dyed ones with less.
    """
    weights = np.zeros(len(sprites))
    groups: dict[tuple[str, str], list[int]] = {}
    for i, sprite in enumerate(sprites):
        groups.setdefault((sprite.style, sprite.noun), []).append(i)
    for (_, noun), members in groups.items():
        dyes = sum(bool(sprites[i].colour) for i in members)
        # A single picture and its dyes stand on a par; beside many pictures the dyes stay a minority.
        share = np.array([1.0 if not sprites[i].colour else max(0.35, 1 - len(members) / 20) for i in members])
        boost = subject_weight if noun in SUBJECT_NOUNS else 1.0
        weights[members] = boost * np.sqrt(len(members) - dyes + min(dyes, 2)) * share / share.sum()
    flat = np.array([sprite.style == "flat" for sprite in sprites])
    for mask, amount in ((flat, _FLAT_SHARE), (~flat, 1 - _FLAT_SHARE)):
        if mask.any():
            weights[mask] *= amount / weights[mask].sum()
    return weights / weights.sum()


def _background(rng: np.random.Generator, size: int, split: str):
    """A background: (its index in BACKGROUNDS, the colours it is called by, its picture)."""
    draw = rng.random()
    names = tuple(COLOURS)
    if draw < _PLAIN:
        colour = names[int(rng.integers(len(names)))]
        return scenes.BACKGROUNDS.index(colour), (colour,), scenes.plain(rng, colour, size)
    if draw < _PLAIN + _GRADIENT:
        first, second = (names[int(i)] for i in rng.choice(len(names), 2, replace=False))
        return scenes.BACKGROUNDS.index("gradient"), (first, second), scenes.gradient(rng, first, second, size)
    name = scenes.SETTINGS[int(rng.integers(len(scenes.SETTINGS)))]
    return scenes.BACKGROUNDS.index(name), (), scenes.setting(rng, name, size, split)


def _stand(rng: np.random.Generator, sprite: Sprite, grounded: bool) -> dict:
    """A pose: scale, position, angle, mirror. On a ground the thing stands in the lower part, upright.

    Things are large and not far from the middle: what a small base has to learn of each is its looks, not its place.
    """
    scale = rng.uniform(0.6, 0.92)
    height, width = (side * scale / max(sprite.rgba.shape[:2]) for side in sprite.rgba.shape[:2])
    x = 0.5 + (1 - width) * rng.uniform(-0.35, 0.35)
    y = 0.5 + (1 - height) * rng.uniform(-0.35, 0.35)
    if grounded:
        y = 0.94 - height / 2 - 0.25 * (1 - scale) * rng.random()
    angle = rng.normal(0, 3 if grounded else 5)
    return dict(scale=scale, x=x, y=y, angle=float(np.clip(angle, -12, 12)), mirror=bool(rng.random() < 0.5))


def render_one(sprites, cumulative, size: int, seed: int, index: int, split: str = "train"):
    """Picture `index`: (image [size, size, 3] uint8, caption, sprite index, background index)."""
    rng = np.random.default_rng((zlib.crc32(split.encode()), seed, index))
    label = int(np.searchsorted(cumulative, rng.random(), side="right"))
    sprite = sprites[min(label, len(sprites) - 1)]
    background, colours, picture = _background(rng, size, split)
    name = scenes.BACKGROUNDS[background]
    image = scenes.place(picture, sprite, **_stand(rng, sprite, name in scenes.GROUNDED), shadow=rng.random() < 0.8)
    return image, caption(rng, sprite, name, colours), label, background


def render(
    sprites: list[Sprite],
    n: int,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
    start: int = 0,
    subject_weight: float = 4.0,
) -> tuple[UInt8[np.ndarray, "n h w 3"], list[str], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
    """Renders pictures `start` to `start + n` of an endless series.

    Args:
      sprites: what may be shown, as `load_sprites` gives it.
      n: how many.
      size: side in pixels.
      seed: which series. Picture i of a series is the same whatever n and start.
      split: another name gives other poses and other pictures of the settings ("train", "test", ...).
      start: the first index.
      subject_weight: how many times as often as others the classes that people fine-tune (SUBJECT_NOUNS) come up.

    Returns:
      images, captions, labels (indices into `sprites`) and backgrounds (indices into BACKGROUNDS).

    Raises:
      ValueError: there are no sprites.
    """
    if not sprites:
        raise ValueError("no sprites to render: pass what load_sprites() returns")
    cumulative = np.cumsum(sprite_weights(sprites, subject_weight))
    images = np.empty((n, size, size, 3), np.uint8)
    captions, labels, backgrounds = [], np.empty(n, np.int32), np.empty(n, np.int32)
    for i in range(n):
        images[i], text, labels[i], backgrounds[i] = render_one(sprites, cumulative, size, seed, start + i, split)
        captions.append(text)
    return images, captions, labels, backgrounds
