"""Backgrounds and compositing: plain colours, gradients, procedural settings, and a sprite standing in them.

Settings are functions of (rng, size) in numpy, drawn so that they can be told apart at 64x64. They are slow next to a
composite, so `textures` draws a bank of each once and a picture takes a shifted, mirrored, re-lit member of the bank.
"""

import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from dreambooth_jax.tiny.world.names import COLOURS
from dreambooth_jax.tiny.world.sprites import Sprite

Picture = Float[np.ndarray, "h w 3"]  # 0..255


def noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 3) -> Float[np.ndarray, "h w"]:
    """Smooth value noise in about [0, 1]: `cells` bumps across, each octave twice as fine and half as strong."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        count = min(size, cells * 2**octave)
        grid = Image.fromarray(rng.random((count, count), dtype=np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    return total / (2 - 2 ** (1 - octaves))


def blend(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray, amount: Float[np.ndarray, "h w"]) -> Picture:
    """a where `amount` is 0 and b where it is 1; both are colours or pictures."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + np.clip(amount, 0, 1)[..., None] * (b - a)


def _rows(size: int) -> Float[np.ndarray, "h w"]:
    return np.repeat(np.linspace(0, 1, size, dtype=np.float32)[:, None], size, axis=1)


def _edge(size: int, at: Float[np.ndarray, "w"] | float) -> Float[np.ndarray, "h w"]:
    """0 above the line `at` (a fraction of the height, for each column), 1 below it, soft over about a pixel."""
    return np.clip((_rows(size) - at) * size * 0.7 + 0.5, 0, 1)


def _skyline(rng: np.random.Generator, size: int, height: float, roughness: float) -> Float[np.ndarray, "w"]:
    return height + roughness * (noise(rng, size, 3)[size // 2] - 0.5)


def _sky(
    rng: np.random.Generator, size: int, top: Sequence[int] = (95, 165, 235), bottom: Sequence[int] = (205, 230, 250)
) -> Picture:
    clouds = np.clip(noise(rng, size, 3) * 2.4 - 1.35, 0, 0.8)
    return blend(blend(top, bottom, _rows(size) * 1.6), (255, 255, 255), clouds)


def _draw(
    size: int,
    paint: Callable[[ImageDraw.ImageDraw, int], None],
    colour: Sequence[float] | np.ndarray = (0, 0, 0),
    scale: int = 2,
) -> UInt8[np.ndarray, "h w 3"]:
    """Lets `paint(draw, side)` draw shapes with PIL at `scale` times the size and shrinks the result."""
    side = size * scale
    image = Image.new("RGB", (side, side), tuple(int(c) for c in colour))
    paint(ImageDraw.Draw(image), side)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _snow(rng: np.random.Generator, size: int) -> Picture:
    hills = _edge(size, _skyline(rng, size, 0.42, 0.25))
    ground = blend((205, 220, 242), (252, 253, 255), noise(rng, size, 4) * 1.3)
    picture = blend(blend((150, 178, 212), (214, 226, 240), _rows(size) * 2), ground, hills)
    flakes = np.zeros((size, size), np.float32)
    flakes[rng.integers(0, size, size // 2), rng.integers(0, size, size // 2)] = 0.95
    return blend(picture, (255, 255, 255), flakes)


def _grass(rng: np.random.Generator, size: int) -> Picture:
    blades = rng.random((size, size), dtype=np.float32)
    blades = (blades + np.roll(blades, 1, 0) + np.roll(blades, 2, 0)) / 3
    field = blend((52, 120, 38), (132, 196, 70), 0.6 * noise(rng, size, 4) + 0.8 * (blades - 0.3))
    return blend(_sky(rng, size), field, _edge(size, _skyline(rng, size, 0.36, 0.12)))


def _beach(rng: np.random.Generator, size: int) -> Picture:
    sea = blend((22, 112, 176), (80, 196, 208), (_rows(size) - 0.3) * 3.5 + 0.4 * (noise(rng, size, 8) - 0.5))
    sand = blend((226, 192, 132), (250, 226, 172), noise(rng, size, 6) * 0.7 + 0.4 * rng.random((size, size)))
    shore = _skyline(rng, size, 0.58, 0.14)
    picture = blend(blend(_sky(rng, size), sea, _edge(size, 0.3)), (255, 255, 255), _edge(size, shore - 0.035))
    return blend(picture, sand, _edge(size, shore))


def _night_sky(rng: np.random.Generator, size: int) -> Picture:
    picture = blend((8, 10, 38), (44, 36, 98), _rows(size) + 0.5 * (noise(rng, size, 3) - 0.5))
    stars = np.zeros((size, size), np.float32)
    count = 40
    stars[rng.integers(0, size, count), rng.integers(0, size, count)] = rng.random(count) * 0.7 + 0.3
    if size > 64:
        stars = np.maximum(stars, np.roll(stars, 1, 1))
    return blend(picture, (255, 250, 225), stars)


def _wooden_floor(rng: np.random.Generator, size: int) -> Picture:
    planks = int(rng.integers(5, 8))
    plank = (np.arange(size) * planks // size)[:, None]
    streaks = Image.fromarray(rng.random((size, 6), dtype=np.float32))
    fibre = np.asarray(streaks.resize((size, size), Image.Resampling.BICUBIC))
    tone = rng.random(planks, dtype=np.float32)[plank] * 0.5
    picture = blend((140, 84, 40), (212, 150, 88), tone + 0.55 * fibre)
    seam = (np.arange(size) * planks % size < planks).astype(np.float32)[:, None] * np.ones((1, size), np.float32)
    joints = rng.integers(0, size, planks)[plank] == np.arange(size)[None]
    return blend(picture, (78, 44, 22), 0.75 * np.maximum(seam, joints))


def _brick_wall(rng: np.random.Generator, size: int) -> Picture:
    courses = int(rng.integers(6, 9))
    height, width = size / courses, 2.2 * size / courses
    y, x = np.arange(size)[:, None], np.arange(size)[None]
    course = np.floor(y / height).astype(int)
    across = x + (course % 2) * width / 2
    tone = rng.random((courses + 1, courses + 2), dtype=np.float32)[course, np.floor(across / width).astype(int)]
    brick = blend((150, 58, 42), (202, 100, 72), 0.8 * tone + 0.3 * (rng.random((size, size)) - 0.3))
    thick = max(1.0, size / 56)
    mortar = ((y % height < thick) | (across % width < thick)).astype(np.float32)
    return blend(brick, (205, 192, 178), mortar * 0.9)


def _water(rng: np.random.Generator, size: int) -> Picture:
    swell = noise(rng, size, 4, octaves=2)
    waves = 0.5 + 0.5 * np.sin((_rows(size) ** 1.2 * 9 + swell * 2.2) * 2 * np.pi)
    picture = blend((16, 84, 160), (52, 150, 214), _rows(size) * 0.5 + 0.6 * swell - 0.1)
    return blend(picture, (190, 232, 250), np.clip(waves * 1.6 - 1.0, 0, 1) * noise(rng, size, 7) * 0.9)


def _checkered_cloth(rng: np.random.Generator, size: int) -> Picture:
    colour = np.asarray(((205, 40, 45), (45, 95, 185), (50, 140, 75))[rng.integers(3)], np.float32)
    checks = int(rng.integers(6, 9))
    stripe = (np.arange(size) * checks // size) % 2
    both = (stripe[:, None] + stripe[None]) / 2  # as woven gingham: white, half, full
    return blend((250, 248, 244), colour, both * (0.9 + 0.1 * noise(rng, size, 8)))


def _jungle(rng: np.random.Generator, size: int) -> Picture:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        for depth in np.linspace(0, 1, 70):
            x, y, r = rng.uniform(-0.1, 1.1) * side, rng.uniform(-0.1, 1.1) * side, side * rng.uniform(0.05, 0.12)
            tone = rng.uniform(0.75, 1.15) * (0.45 + 0.55 * depth)
            slant = rng.uniform(-1, 1) * r
            leaf = [(x - r, y + slant), (x, y - r * 0.5), (x + r, y - slant), (x, y + r * 0.5)]
            draw.polygon(leaf, fill=tuple(int(c * tone) for c in (52, 138, 58)))

    return _draw(size, paint, (10, 42, 22)).astype(np.float32)


def _forest(rng: np.random.Generator, size: int) -> Picture:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        for depth in np.linspace(0, 1, 9):
            x, w = rng.uniform(0, 1) * side, side * (0.03 + 0.05 * depth) * rng.uniform(0.7, 1.2)
            tone = 1.25 - 0.6 * depth
            bark = tuple(int(c * tone) for c in (112, 84, 60))
            draw.rectangle((x, 0, x + w, side * (0.62 + 0.12 * depth)), fill=bark)

    leaves = np.clip(0.45 - _rows(size), 0, 1) * 3 * noise(rng, size, 8)
    trunks = blend(_draw(size, paint, (150, 182, 142)), (60, 116, 56), leaves)
    floor = blend((66, 80, 36), (128, 112, 62), noise(rng, size, 8))
    return blend(trunks, floor, _edge(size, _skyline(rng, size, 0.68, 0.08)))


def _desert(rng: np.random.Generator, size: int) -> Picture:
    sky = blend((92, 172, 226), (250, 218, 168), _rows(size) * 2.4)
    far = blend((214, 144, 82), (240, 182, 112), noise(rng, size, 3))
    ripples = 0.5 + 0.5 * np.sin((_rows(size) * 11 + noise(rng, size, 3) * 3) * 2 * np.pi)
    near = blend((226, 160, 88), (248, 202, 132), 0.6 * ripples + 0.3 * noise(rng, size, 4))
    picture = blend(sky, far, _edge(size, _skyline(rng, size, 0.42, 0.3)))
    return blend(picture, near, _edge(size, _skyline(rng, size, 0.56, 0.2)))


def _street(rng: np.random.Generator, size: int) -> Picture:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        x = -rng.uniform(0, 0.1) * side
        while x < side:
            w, top = side * rng.uniform(0.16, 0.28), side * rng.uniform(0.02, 0.25)
            tone = np.array([(168, 120, 104), (140, 146, 160), (186, 164, 128), (118, 128, 146)][rng.integers(4)])
            draw.rectangle((x, top, x + w, side), fill=tuple(int(c) for c in tone))
            for wy in np.arange(top + 0.05 * side, 0.52 * side, 0.1 * side):
                for wx in np.arange(x + 0.03 * side, x + w - 0.04 * side, 0.07 * side):
                    draw.rectangle((wx, wy, wx + 0.035 * side, wy + 0.05 * side), fill=(244, 226, 150))
            x += w
        draw.rectangle((0, 0.58 * side, side, side), fill=(178, 176, 172))
        draw.rectangle((0, 0.66 * side, side, side), fill=(78, 80, 86))
        for dash in np.arange(-rng.uniform(0, 0.3), 1, 0.3) * side:
            draw.rectangle((dash, 0.84 * side, dash + 0.16 * side, 0.87 * side), fill=(240, 236, 220))

    return _draw(size, paint, (176, 206, 232)) + 14 * (rng.random((size, size, 1)) - 0.5)


def _mountains(rng: np.random.Generator, size: int) -> Picture:
    picture = _sky(rng, size, (92, 152, 222), (222, 234, 246))
    jagged = np.abs(((np.arange(size) / size + rng.random()) * 2.0) % 1 - 0.5) + 0.12 * rng.random()
    ridge = 0.16 + 0.8 * jagged * 0.8 + 0.05 * (noise(rng, size, 9)[0] - 0.5)
    rock = blend((98, 104, 128), (66, 72, 98), noise(rng, size, 6))
    rock = blend((246, 248, 252), rock, _edge(size, np.maximum(ridge + 0.1, 0.3) + 0.05 * noise(rng, size, 12)[1]))
    meadow = blend((72, 128, 62), (112, 164, 80), noise(rng, size, 6))
    return blend(blend(picture, rock, _edge(size, ridge)), meadow, _edge(size, _skyline(rng, size, 0.66, 0.08)))


def _sunset(rng: np.random.Generator, size: int) -> Picture:
    y = _rows(size)
    sky = blend(blend((88, 44, 120), (240, 110, 72), y * 2.4), (254, 206, 104), (y - 0.32) * 3.6)
    disc = np.hypot(y - 0.52, np.linspace(0, 1, size)[None] - rng.uniform(0.25, 0.75))
    sky = blend(sky, (255, 242, 190), np.clip((0.13 - disc) * size * 0.7, 0, 1))
    glitter = np.clip(noise(rng, size, 12) * 2.2 - 1.0, 0, 1)
    sea = blend(blend((150, 62, 92), (50, 26, 72), (y - 0.6) * 2.6), (255, 190, 110), glitter * 0.75)
    return blend(sky, sea, _edge(size, 0.6))


def _room(rng: np.random.Generator, size: int) -> Picture:
    wall = np.asarray(((238, 222, 196), (196, 216, 222), (226, 202, 206), (206, 218, 190))[rng.integers(4)], np.float32)
    stripes = ((np.arange(size) * 14 // size) % 2)[None] * np.ones((size, 1))
    upper = blend(wall, wall * 0.93, stripes)
    carpet = blend((150, 96, 84), (182, 128, 108), noise(rng, size, 10) + 0.3 * (rng.random((size, size)) - 0.5))
    picture = blend(upper, (250, 248, 244), _edge(size, 0.6))
    return blend(picture, carpet, _edge(size, 0.66))


def _fire(rng: np.random.Generator, size: int) -> Picture:
    tongues = noise(rng, size, 6) + 0.25 * noise(rng, size, 12) - 0.9 + 1.15 * _rows(size)
    picture = blend((30, 6, 4), (206, 38, 12), tongues * 2.4)
    return blend(blend(picture, (250, 146, 20), tongues * 2.4 - 0.7), (255, 236, 130), tongues * 2.4 - 1.5)


_PAINTERS = {
    "snow": _snow,
    "grass": _grass,
    "beach": _beach,
    "night sky": _night_sky,
    "wooden floor": _wooden_floor,
    "brick wall": _brick_wall,
    "water": _water,
    "checkered cloth": _checkered_cloth,
    "jungle": _jungle,
    "forest": _forest,
    "desert": _desert,
    "street": _street,
    "mountains": _mountains,
    "sunset": _sunset,
    "room": _room,
    "fire": _fire,
}
SETTINGS = tuple(_PAINTERS)
# What `backgrounds` of `dataset.render` counts through.
BACKGROUNDS = (*COLOURS, "gradient", *SETTINGS)
# Settings with a floor: what is in them stands, with a shadow under it, instead of floating.
GROUNDED = frozenset({"snow", "grass", "beach", "forest", "desert", "street", "mountains", "room"})
BANK = 24  # pictures per setting


@functools.lru_cache(maxsize=2048)
def texture(setting: str, size: int, bank: str, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Picture `index` of a bank: a square 5/4 of `size`, so that crops of it shift.

    Raises:
      KeyError: an unknown setting; SETTINGS has all.
    """
    rng = np.random.default_rng((zlib.crc32(f"{bank}/{setting}".encode()), index))
    return np.clip(np.asarray(_PAINTERS[setting](rng, size * 5 // 4)), 0, 255).astype(np.uint8)


def plain(rng: np.random.Generator, colour: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """A wall of one named colour, a little uneven: lighter towards one side."""
    tone = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 7, 3)
    light = np.linspace(-8, 8, size, dtype=np.float32) * rng.uniform(-1, 1)
    side = np.zeros((size, size, 3), np.float32) + light[:, None, None]
    return np.clip(tone + side, 0, 255).astype(np.uint8)


def gradient(rng: np.random.Generator, first: str, second: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """One named colour passing into another, in any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = np.cos(angle) * x[None] + np.sin(angle) * x[:, None] + 0.5
    return np.clip(blend(COLOURS[first], COLOURS[second], along), 0, 255).astype(np.uint8)


def setting(rng: np.random.Generator, name: str, size: int, bank: str = "train") -> UInt8[np.ndarray, "h w 3"]:
    """A procedural setting: a shifted, mirrored, re-lit picture of its bank."""
    picture = texture(name, size, bank, int(rng.integers(BANK)))
    top, left = rng.integers(0, len(picture) - size + 1, 2)
    picture = picture[top : top + size, left : left + size]
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    return np.minimum(picture * np.float32(rng.uniform(0.88, 1.1)), 255).astype(np.uint8)


@functools.lru_cache(maxsize=16384)
def mip(sprite: Sprite, longest: int) -> Image.Image:
    """The sprite premultiplied and shrunk to `longest` pixels: turning a large picture small in one go would alias."""
    image = Image.fromarray(sprite.rgba)
    shrink = min(1.0, longest / max(image.size))
    small = image.convert("RGBa").resize([max(1, round(side * shrink)) for side in image.size], Image.Resampling.BOX)
    framed = Image.new("RGBa", (small.width + 2, small.height + 2))  # clear edges, or turning would cut steps into them
    framed.paste(small, (1, 1))
    return framed


def mip_side(pixels: float) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ... that is not smaller."""
    side = 16
    while side < pixels:
        side = side * 3 // 2 if side & (side - 1) == 0 else side * 4 // 3
    return side


@functools.lru_cache(maxsize=1024)
def _shadow(width: int, height: int) -> Float[np.ndarray, "h w"]:
    """How much light is left under a thing that is `width` pixels wide, in a box of that size."""
    x = (np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1
    y = (np.arange(height, dtype=np.float32) + 0.5) / height * 2 - 1
    return 1 - 0.5 * np.clip(1.15 * (1 - x[None] ** 2 - y[:, None] ** 2), 0, 1)


def _cast_shadow(picture: UInt8[np.ndarray, "h w 3"], centre: float, bottom: float, width: float) -> None:
    """Darkens `picture` in place, in a soft ellipse around the point where something stands."""
    size = len(picture)
    box_w, box_h = max(3, round(width * 1.05)), max(3, round(width * 0.22))
    left, top = round(centre - box_w / 2), round(bottom - box_h * 0.6)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + box_w, size), min(top + box_h, size)
    if x0 < x1 and y0 < y1:
        light = _shadow(box_w, box_h)[y0 - top : y1 - top, x0 - left : x1 - left, None]
        picture[y0:y1, x0:x1] = (picture[y0:y1, x0:x1] * light).astype(np.uint8)


def place(
    picture: UInt8[np.ndarray, "h w 3"],
    sprite: Sprite,
    scale: float,
    x: float,
    y: float,
    angle: float = 0.0,
    mirror: bool = False,
    shadow: bool = True,
) -> UInt8[np.ndarray, "h w 3"]:
    """Puts a sprite into a square picture.

    Args:
      picture: the background; it is not changed.
      scale: the sprite's longer side as a fraction of the picture's side.
      x, y: where the sprite's centre comes, as fractions of the side.
      angle: degrees, counter-clockwise.
      mirror: left and right change places.
      shadow: a soft shadow under it.

    Returns:
      A new picture of the same shape.
    """
    size = len(picture)
    image = mip(sprite, mip_side(scale * size))
    zoom = (max(image.size) - 2) / (scale * size)  # pixels of `image` for one of `picture`
    cos, sin = np.cos(np.radians(angle)) * zoom, np.sin(np.radians(angle)) * zoom
    flip = -1 if mirror else 1
    cx, cy, u, v = x * size, y * size, image.width / 2, image.height / 2
    # PIL wants, for each pixel of the result, the pixel of the source.
    matrix = (flip * cos, -flip * sin, u - flip * (cos * cx - sin * cy), sin, cos, v - (sin * cx + cos * cy))
    layer = np.asarray(image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    picture = picture.copy()
    if shadow:
        columns = np.flatnonzero(layer[..., 3].max(axis=0) > 64)
        rows = np.flatnonzero(layer[..., 3].max(axis=1) > 64)
        if len(columns) and rows[-1] < size - 1:
            _cast_shadow(
                picture, float(columns[0] + columns[-1]) / 2, float(rows[-1]), float(columns[-1] - columns[0] + 1)
            )
    through = picture * (255 - layer[..., 3:].astype(np.uint16)) // 255
    return np.minimum(through + layer[..., :3], 255).astype(np.uint8)
