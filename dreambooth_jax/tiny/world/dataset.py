"""The data set: pictures rendered on the fly, each a function of (split, seed, index) alone."""

import functools
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image, ImageFilter

from dreambooth_jax.tiny.world import scenes
from dreambooth_jax.tiny.world.captions import caption
from dreambooth_jax.tiny.world.names import COLOURS, SUBJECT_NOUNS
from dreambooth_jax.tiny.world.sprites import Sprite

_FLAT_SHARE = 0.08
_PLAIN, _GRADIENT = 0.45, 0.05  # shares of plain and gradient backgrounds; settings share the rest
SUBJECT_SHARE = 0.5  # of all draws, for SUBJECT_NOUNS
_FAVOURED = {"dog": 4.0, "cat": 2.5}  # as many draws as so many other subjects
SCALES = (0.66, 0.9)  # of a sprite's longer side, as fractions of the picture's side
_MELTS = 42.0  # RGB distance between a sprite's outline and what is behind it, below which the outline is lost


def sprite_weights(sprites: list[Sprite], subject_share: float = SUBJECT_SHARE) -> Float[np.ndarray, "s"]:
    """Probability of each sprite.

    Within a style SUBJECT_NOUNS have `subject_share` of the draws together; a noun counts by the square root of its
    number of individuals (all its dyed ones as two at most) and shares its draws among its individuals, the dyed ones
    with less, and each of these among its poses.
    """
    weights = np.zeros(len(sprites))
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    for i, sprite in enumerate(sprites):
        groups.setdefault((sprite.style, sprite.noun), {}).setdefault(sprite.individual, []).append(i)
    for (_, noun), members in groups.items():
        dyes = sum(bool(sprites[poses[0]].colour) for poses in members.values())
        dyed_share = max(0.35, 1 - len(members) / 20)  # a single picture and its dyes stand on a par
        shares = {name: dyed_share if sprites[poses[0]].colour else 1.0 for name, poses in members.items()}
        amount = _FAVOURED.get(noun, 1.0) * np.sqrt(len(members) - dyes + min(dyes, 2))
        for name, poses in members.items():
            weights[poses] = amount * shares[name] / sum(shares.values()) / len(poses)
    flat = np.array([sprite.style == "flat" for sprite in sprites])
    subject = np.array([sprite.noun in SUBJECT_NOUNS for sprite in sprites])
    for is_flat, style_share in ((flat, _FLAT_SHARE), (~flat, 1 - _FLAT_SHARE)):
        for mask, share in ((is_flat & subject, subject_share), (is_flat & ~subject, 1 - subject_share)):
            if mask.any():
                weights[mask] *= style_share * share / weights[mask].sum()
    return weights / weights.sum()


def outline(rgba: UInt8[np.ndarray, "h w 4"]) -> Float[np.ndarray, "n 3"]:
    """Colours along the outline of a sprite."""
    alpha = Image.fromarray(rgba[..., 3])
    inner = np.asarray(alpha.filter(ImageFilter.MinFilter(7)))
    ring = (rgba[..., 3] > 200) & (inner < 200)
    return rgba[ring][:, :3].astype(np.float32)


def background_weights(sprites: list[Sprite], size: int = 64) -> Float[np.ndarray, "s g"]:
    """Probability of each of BACKGROUNDS behind each sprite: none into which its outline melts.

    An outline melts where more than 40 % of it is closer than `_MELTS` to the mean colour of the background; a sprite
    that would melt into everything keeps every background.
    """
    kinds = {True: _PLAIN / len(COLOURS), False: (1 - _PLAIN - _GRADIENT) / len(scenes.SETTINGS)}
    prior = np.array([_GRADIENT if name == "gradient" else kinds[name in COLOURS] for name in scenes.BACKGROUNDS])
    means = np.stack([_mean_colour(name, size) for name in scenes.BACKGROUNDS])
    weights = np.zeros((len(sprites), len(prior)))
    for sprite, row in zip(sprites, weights, strict=True):
        distance = np.linalg.norm(outline(sprite.rgba)[:, None] - means[None], axis=2)
        clear = (distance < _MELTS).mean(0) < 0.4
        row[:] = prior * (clear if clear.any() else 1.0)
        row /= row.sum()
    return weights


@functools.lru_cache
def _mean_colour(background: str, size: int) -> Float[np.ndarray, "3"]:
    """Mean colour of a background; of a gradient none that any sprite has."""
    if background in COLOURS:
        return np.asarray(COLOURS[background], np.float32)
    if background == "gradient":
        return np.full(3, np.inf, np.float32)
    return scenes.texture(background, size, "train", 0).reshape(-1, 3).mean(0).astype(np.float32)


def _background(
    rng: np.random.Generator, background: int, size: int, split: str
) -> tuple[tuple[str, ...], UInt8[np.ndarray, "h w 3"]]:
    """A picture of a background and the colours it is called by."""
    name = scenes.BACKGROUNDS[background]
    if name in COLOURS:
        return (name,), scenes.plain(rng, name, size)
    if name == "gradient":
        first, second = (tuple(COLOURS)[int(i)] for i in rng.choice(len(COLOURS), 2, replace=False))
        return (first, second), scenes.gradient(rng, first, second, size)
    return (), scenes.setting(rng, name, size, split)


def _stand(rng: np.random.Generator, sprite: Sprite, grounded: bool) -> dict:
    """A pose: scale, position, angle, mirror. On a ground the thing stands in the lower part, upright.

    Things are large and not far from the middle: what a small base has to learn of each is its looks, not its place.
    """
    scale = rng.uniform(*SCALES)
    height, width = (side * scale / max(sprite.rgba.shape[:2]) for side in sprite.rgba.shape[:2])
    x = 0.5 + (1 - width) * rng.uniform(-0.35, 0.35)
    y = 0.5 + (1 - height) * rng.uniform(-0.35, 0.35)
    if grounded:
        y = 0.94 - height / 2 - 0.25 * (1 - scale) * rng.random()
    angle = rng.normal(0, 3 if grounded else 5)
    return dict(scale=scale, x=x, y=y, angle=float(np.clip(angle, -12, 12)), mirror=bool(rng.random() < 0.5))


class Tables(NamedTuple):
    """Cumulative probabilities of the sprites [s], and of the backgrounds behind each [s, g]."""

    sprites: Float[np.ndarray, "s"]
    backgrounds: Float[np.ndarray, "s g"]


def tables(sprites: list[Sprite], subject_share: float = SUBJECT_SHARE) -> Tables:
    """Probabilities of a series of pictures, cumulative."""
    return Tables(np.cumsum(sprite_weights(sprites, subject_share)), np.cumsum(background_weights(sprites), axis=1))


def _draw(rng: np.random.Generator, cumulative: Float[np.ndarray, "n"]) -> int:
    return min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(cumulative) - 1)


def render_one(
    sprites: list[Sprite], drawn: Tables, size: int, seed: int, index: int, split: str = "train"
) -> tuple[UInt8[np.ndarray, "h w 3"], str, int, int]:
    """Picture `index`: (image [size, size, 3] uint8, caption, sprite index, background index)."""
    rng = np.random.default_rng((zlib.crc32(split.encode()), seed, index))
    label = _draw(rng, drawn.sprites)
    sprite = sprites[label]
    background = _draw(rng, drawn.backgrounds[label])
    colours, picture = _background(rng, background, size, split)
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
    subject_share: float = SUBJECT_SHARE,
) -> tuple[UInt8[np.ndarray, "n h w 3"], list[str], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
    """Renders pictures `start` to `start + n` of an endless series.

    Args:
      sprites: what may be shown, as `load_sprites` gives it.
      n: how many.
      size: side in pixels.
      seed: which series. Picture i of a series is the same whatever n and start.
      split: another name gives other poses and other pictures of the settings ("train", "test", ...).
      start: the first index.
      subject_share: share of the draws that show a class that people fine-tune (SUBJECT_NOUNS).

    Returns:
      images, captions, labels (indices into `sprites`) and backgrounds (indices into BACKGROUNDS).

    Raises:
      ValueError: there are no sprites.
    """
    if not sprites:
        raise ValueError("no sprites to render: pass what load_sprites() returns")
    drawn = tables(sprites, subject_share)
    images = np.empty((n, size, size, 3), np.uint8)
    captions, labels, backgrounds = [], np.empty(n, np.int32), np.empty(n, np.int32)
    for i in range(n):
        images[i], text, labels[i], backgrounds[i] = render_one(sprites, drawn, size, seed, start + i, split)
        captions.append(text)
    return images, captions, labels, backgrounds
