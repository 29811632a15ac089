"""The data set on the device: sprites and settings in an atlas, pictures composed from it by the training step itself.

The same world as `dataset.render`, which draws with PIL on the host and makes the frozen references: here a batch costs
no host time and no picture is shown twice.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from PIL import Image

from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.tiny.world import scenes
from dreambooth_jax.tiny.world.captions import media, places, things
from dreambooth_jax.tiny.world.dataset import SCALES, background_weights, sprite_weights
from dreambooth_jax.tiny.world.names import COLOURS
from dreambooth_jax.tiny.world.scenes import BACKGROUNDS, GROUNDED, SETTINGS
from dreambooth_jax.tiny.world.sprites import Sprite

GRADIENT = BACKGROUNDS.index("gradient")


class Phrases(NamedTuple):
    """The wordings of each of n things to say.

    Attributes:
        ids: tokens, padded with 0 [n, k, l].
        length: number of tokens [n, k].
        cumulative: of the probabilities [n, k].
    """

    ids: Int[Array, "n k l"]
    length: Int[Array, "n k"]
    cumulative: Float[Array, "n k"]


class Atlas(NamedTuple):
    """The material of pictures and captions.

    Attributes:
        sprites: premultiplied RGBA, each centred in a square, one array per level of detail [s, side + 2, side + 2, 4].
        extent: height and width of each sprite as fractions of its longer side [s, 2].
        sprite_logits: logarithm of each sprite's probability [s].
        background_logits: logarithm of the probability of each background behind each sprite [s, g].
        settings: pictures of each setting [g, n, h, w, 3].
        individual: number of the individual that each sprite shows [s].
        style: row of `medium` for each sprite [s].
        medium, thing, place: the parts of a caption; `place` has rows for BACKGROUNDS, then for pairs of colours.
        special: ids of the start, end and padding tokens [3]; start is -1 for a tokenizer that has none.
    """

    sprites: tuple[UInt8[Array, "s h w 4"], ...]
    extent: Float[Array, "s 2"]
    sprite_logits: Float[Array, "s"]
    background_logits: Float[Array, "s g"]
    settings: UInt8[Array, "g n h w 3"]
    individual: Int[Array, "s"]
    style: Int[Array, "s"]
    medium: Phrases
    thing: Phrases
    place: Phrases
    special: Int[Array, "3"]


class Labels(NamedTuple):
    """Draws of each picture: numbers of its sprite, its background and, for a gradient, its two colours."""

    sprite: Int[Array, "b"]
    background: Int[Array, "b"]
    colours: Int[Array, "b 2"]


def make_atlas(
    sprites: list[Sprite], tokenizer: Tokenizer, size: int, *, subject_share: float, bank: str = "train"
) -> Atlas:
    """The atlas of pictures of `size` pixels a side.

    Args:
        sprites: sprites to show.
        tokenizer: turns phrases into ids; tokens of a caption are those of its words.
        size: side of the pictures in pixels.
        subject_share: share of the draws that show SUBJECT_NOUNS.
        bank: which pictures of the settings.
    """
    individuals = sorted({sprite.individual for sprite in sprites})
    styles = sorted({sprite.style for sprite in sprites})
    names = tuple(COLOURS)
    pairs = [places("gradient", (first, second)) for first in names for second in names]
    grounds = [places(name, (name,) if name in COLOURS else (names[0], names[1])) for name in BACKGROUNDS]
    drawn = [[scenes.texture(name, size, bank, i) for i in range(scenes.BANK)] for name in SETTINGS]
    sides = [side for side in (12, 16, 24, 32, 48, 64, 96, 128) if side < SCALES[1] * size * 1.5]
    extent = [np.array(sprite.rgba.shape[:2]) / max(sprite.rgba.shape[:2]) for sprite in sprites]
    with np.errstate(divide="ignore"):
        logits = [np.log(x) for x in (sprite_weights(sprites, subject_share), background_weights(sprites))]
    return Atlas(
        sprites=tuple(jnp.asarray(np.stack([_square(s, side) for s in sprites])) for side in _useful(sides, size)),
        extent=jnp.asarray(np.stack(extent), jnp.float32),
        sprite_logits=jnp.asarray(logits[0], jnp.float32),
        background_logits=jnp.asarray(logits[1], jnp.float32),
        settings=jnp.asarray(np.array(drawn)),
        individual=jnp.asarray([individuals.index(s.individual) for s in sprites], jnp.int32),
        style=jnp.asarray([styles.index(s.style) for s in sprites], jnp.int32),
        medium=_phrases([media(style) for style in styles], tokenizer),
        thing=_phrases([things(sprite) for sprite in sprites], tokenizer),
        place=_phrases([*grounds, *pairs], tokenizer),
        special=jnp.asarray([_start(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id], jnp.int32),
    )


def _start(tokenizer: Tokenizer) -> int:
    return -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _useful(sides: list[int], size: int) -> list[int]:
    """The levels of detail that `SCALES` needs: from the first that is no smaller than the smallest sprite."""
    least = scenes.mip_side(SCALES[0] * size)
    return [side for side in sides if side >= least] or [least]


def _square(sprite: Sprite, side: int) -> UInt8[np.ndarray, "h w 4"]:
    image = scenes.mip(sprite, side)
    framed = Image.new("RGBa", (side + 2, side + 2))
    framed.paste(image, ((side + 2 - image.width) // 2, (side + 2 - image.height) // 2))
    return np.asarray(framed)


def _phrases(options: list[dict[str, float]], tokenizer: Tokenizer) -> Phrases:
    most = max(map(len, options))
    rows = [[tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in row] for row in options]
    ids = np.zeros((len(rows), most, max(len(ids) for row in rows for ids in row)), np.int32)
    length = np.zeros((len(rows), most), np.int32)
    cumulative = np.ones((len(rows), most), np.float32)
    for i, (row, probabilities) in enumerate(zip(rows, options, strict=True)):
        for j, tokens in enumerate(row):
            ids[i, j, : len(tokens)], length[i, j] = tokens, len(tokens)
        sums = np.cumsum(list(probabilities.values()))
        cumulative[i, : len(row)] = sums / sums[-1]
    return Phrases(jnp.asarray(ids), jnp.asarray(length), jnp.asarray(cumulative))


def draw_labels(atlas: Atlas, key: Key[Array, ""], count: int, sprite: Int[Array, "b"] | None = None) -> Labels:
    """Draws `count` sprites, or takes those given, and for each a background that it does not melt into."""
    sprite_key, background_key, first_key, other_key = jax.random.split(key, 4)
    if sprite is None:
        sprite = jax.random.categorical(sprite_key, atlas.sprite_logits, shape=(count,))
    background = jax.random.categorical(background_key, atlas.background_logits[sprite])
    first = jax.random.randint(first_key, (count,), 0, len(COLOURS))
    other = (first + jax.random.randint(other_key, (count,), 1, len(COLOURS))) % len(COLOURS)
    return Labels(sprite, background, jnp.stack([first, other], axis=1))


def caption_ids(atlas: Atlas, labels: Labels, key: Key[Array, ""], length: int) -> Int[Array, "b l"]:
    """Token ids of a random caption of each picture, padded to `length`."""
    first, second = labels.colours[:, 0], labels.colours[:, 1]
    pair = len(BACKGROUNDS) + first * len(COLOURS) + second
    rows = (
        (atlas.medium, atlas.style[labels.sprite]),
        (atlas.thing, labels.sprite),
        (atlas.place, jnp.where(labels.background == GRADIENT, pair, labels.background)),
    )
    start, end, pad = atlas.special
    keys = jax.random.split(key, len(rows))
    parts = [_pick(phrases, row, k) for (phrases, row), k in zip(rows, keys, strict=True)]
    position = jnp.arange(length)[None]
    starts = start >= 0
    ids = jnp.where((position == 0) & starts, start, pad)
    at = jnp.full((len(labels.sprite), 1), starts, jnp.int32)
    for tokens, count in parts:
        within = position - at
        taken = jnp.take_along_axis(tokens, jnp.clip(within, 0, tokens.shape[1] - 1), axis=1)
        ids = jnp.where((within >= 0) & (within < count[:, None]), taken, ids)
        at = at + count[:, None]
    return jnp.where(position == jnp.minimum(at, length - 1), end, ids)


def _pick(phrases: Phrases, row: Int[Array, "b"], key: Key[Array, ""]) -> tuple[Int[Array, "b l"], Int[Array, "b"]]:
    uniform = jax.random.uniform(key, (len(row), 1))
    choice = (uniform >= phrases.cumulative[row]).sum(1)
    choice = jnp.minimum(choice, phrases.length.shape[1] - 1)
    return phrases.ids[row, choice], phrases.length[row, choice]


def compose(
    atlas: Atlas,
    labels: Labels,
    key: Key[Array, ""],
    size: int,
    change: Callable[[Float[Array, "b h w 4"], Key[Array, ""]], Float[Array, "b h w 4"]] = lambda layers, key: layers,
) -> UInt8[Array, "b h w 3"]:
    """Pictures of `size` pixels a side, each with a pose, a view of its background and a shadow of its own.

    Args:
        change: of the sprites' layers, premultiplied RGBA in 0..255, before they join their backgrounds.
    """
    layer_key, change_key, background_key = jax.random.split(key, 3)
    count = len(labels.sprite)
    layers = jax.vmap(functools.partial(_standing, atlas, size=size))(labels, jax.random.split(layer_key, count))
    join = jax.vmap(functools.partial(_join, atlas, size=size))
    return join(labels, change(layers, change_key), jax.random.split(background_key, count))


def _standing(atlas: Atlas, labels: Labels, key: Key[Array, ""], *, size: int) -> Float[Array, "h w 4"]:
    grounded = jnp.asarray([name in GROUNDED for name in BACKGROUNDS])[labels.background]
    return _layer(atlas, labels.sprite, *_stand(atlas.extent[labels.sprite], grounded, key), size)


def _join(
    atlas: Atlas, labels: Labels, layer: Float[Array, "h w 4"], key: Key[Array, ""], *, size: int
) -> UInt8[Array, "h w 3"]:
    background_key, shadow_key = jax.random.split(key)
    picture = _background(atlas, labels, background_key, size)
    shaded = _shade(picture, layer[..., 3], size)
    picture = jnp.where(jax.random.bernoulli(shadow_key, 0.8), shaded, picture)
    mixed = picture * (1 - layer[..., 3:] / 255) + layer[..., :3]
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


def _stand(
    extent: Float[Array, "2"], grounded: Bool[Array, ""], key: Key[Array, ""]
) -> tuple[Array, Array, Array, Array, Array]:
    """Scale, x, y, angle in radians and mirror, as `dataset._stand` draws them."""
    u = jax.random.uniform(key, (5,))
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * u[0]
    height, width = extent * scale
    x = 0.5 + (1 - width) * 0.35 * (2 * u[1] - 1)
    free = 0.5 + (1 - height) * 0.35 * (2 * u[2] - 1)
    standing = 0.94 - height / 2 - 0.25 * (1 - scale) * u[2]
    angle = jax.random.normal(jax.random.fold_in(key, 1)) * jnp.where(grounded, 3, 5)
    return scale, x, jnp.where(grounded, standing, free), jnp.deg2rad(jnp.clip(angle, -12, 12)), u[4] < 0.5


def _layer(
    atlas: Atlas, sprite: Array, scale: Array, x: Array, y: Array, angle: Array, mirror: Array, size: int
) -> Float[Array, "h w 4"]:
    """The sprite alone, premultiplied, 0..255: each pixel is looked up in the next level of detail."""
    sides = [level.shape[1] - 2 for level in atlas.sprites]
    level = sum((scale * size > side).astype(jnp.int32) for side in sides[:-1]) if len(sides) > 1 else 0
    views = [
        functools.partial(_look_up, pixels[sprite], side) for pixels, side in zip(atlas.sprites, sides, strict=True)
    ]
    return jax.lax.switch(level, views, scale * size, x * size, y * size, angle, mirror, jnp.zeros((size, size)))


def _look_up(
    pixels: Array,
    side: int,
    longest: Array,
    x: Array,
    y: Array,
    angle: Array,
    mirror: Array,
    canvas: Float[Array, "h w"],
) -> Float[Array, "h w 4"]:
    rows, columns = jnp.indices(canvas.shape) + 0.5
    dx, dy, zoom = columns - x, rows - y, side / longest
    u = (jnp.cos(angle) * dx - jnp.sin(angle) * dy) * jnp.where(mirror, -1, 1) * zoom
    v = (jnp.sin(angle) * dx + jnp.cos(angle) * dy) * zoom
    centre = (side + 2) / 2 - 0.5
    u, v = u + centre, v + centre
    left, top = jnp.floor(u).astype(jnp.int32), jnp.floor(v).astype(jnp.int32)
    total = jnp.zeros((*canvas.shape, 4))
    for i in (0, 1):
        for j in (0, 1):
            weight = (1 - jnp.abs(u - left - i)) * (1 - jnp.abs(v - top - j))
            within = (left + i >= 0) & (left + i < side + 2) & (top + j >= 0) & (top + j < side + 2)
            taken = pixels[jnp.clip(top + j, 0, side + 1), jnp.clip(left + i, 0, side + 1)].astype(jnp.float32)
            total += jnp.where(within, weight, 0)[..., None] * taken
    return total


def _shade(picture: Float[Array, "h w 3"], alpha: Float[Array, "h w"], size: int) -> Float[Array, "h w 3"]:
    """The soft ellipse of `scenes.place` under the visible part of the sprite."""
    columns, rows = (alpha > 64).any(0), (alpha > 64).any(1)
    first, last = jnp.argmax(columns), size - 1 - jnp.argmax(columns[::-1])
    bottom, width = size - 1 - jnp.argmax(rows[::-1]), last - first + 1
    y, x = jnp.indices(alpha.shape).astype(jnp.float32)
    half_width, height = 0.525 * width, jnp.maximum(0.22 * width, 3.0)
    dx = (x - (first + last) / 2) / half_width
    dy = (y + 0.5 - (bottom - 0.1 * height)) / (height / 2)
    light = 1 - 0.5 * jnp.clip(1.15 * (1 - dx**2 - dy**2), 0, 1)
    inside = (jnp.abs(dx) < 1) & (jnp.abs(dy) < 1) & (bottom < size - 1)
    return picture * jnp.where(inside, light, 1.0)[..., None]


def _background(atlas: Atlas, labels: Labels, key: Key[Array, ""], size: int) -> Float[Array, "h w 3"]:
    """A plain wall, a gradient or a view of a setting, 0..255."""
    colours = jnp.asarray(list(COLOURS.values()), jnp.float32)
    tone_key, light_key, angle_key, view_key = jax.random.split(key, 4)
    along = jnp.linspace(-0.5, 0.5, size)
    tone = colours[jnp.minimum(labels.background, len(COLOURS) - 1)] + 7 * jax.random.normal(tone_key, (3,))
    light = 16 * along * jax.random.uniform(light_key, minval=-1, maxval=1)
    plain = jnp.broadcast_to(tone + light[:, None, None], (size, size, 3))
    angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
    amount = jnp.clip(jnp.cos(angle) * along[None] + jnp.sin(angle) * along[:, None] + 0.5, 0, 1)[..., None]
    first, second = colours[labels.colours]
    gradient = first + amount * (second - first)
    view = _view(atlas.settings, jnp.clip(labels.background - GRADIENT - 1, 0), view_key, size)
    kind = (labels.background >= GRADIENT).astype(jnp.int32) + (labels.background > GRADIENT)
    return jnp.clip(jax.lax.select_n(kind, plain, gradient, view), 0, 255)


def _view(
    settings: UInt8[Array, "g n rows columns 3"], number: Int[Array, ""], key: Key[Array, ""], size: int
) -> Float[Array, "h w 3"]:
    """A shifted, mirrored, re-lit picture of a setting."""
    which, shift, mirror, light = jax.random.split(key, 4)
    index = jax.random.randint(which, (), 0, settings.shape[1])
    top, left = jax.random.randint(shift, (2,), 0, settings.shape[2] - size + 1)
    view = jax.lax.dynamic_slice(settings, (number, index, top, left, 0), (1, 1, size, size, 3))[0, 0]
    view = jnp.where(jax.random.bernoulli(mirror), view[:, ::-1], view).astype(jnp.float32)
    return view * jax.random.uniform(light, minval=0.88, maxval=1.1)
