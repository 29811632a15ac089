"""Draws the example subjects: six things that the embedded base has never seen, five pictures of each.

    python examples/subjects/draw.py [--source FOLDER_OF_TGZ] [--out examples/subjects]

The dog, the cat and the car are made from sprites that the base's training leaves out (`sprites.HELD_OUT`), the
backpack, the teapot and the robot from ones it knows. Each has a coat of its own, loud enough to be told at 64x64. The
pictures of the settings come from a bank that training does not use. Licences: dreambooth_jax/tiny/world/LICENSES.md.
"""

import argparse
import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageFilter

from dreambooth_jax.tiny.world import COLOURS, load_sprites
from dreambooth_jax.tiny.world.scenes import GROUNDED, blend, noise, place, plain, setting
from dreambooth_jax.tiny.world.sprites import cut_out, tint

SIZE = 256
SPLIT = "subjects"


def _coat(rgba: np.ndarray, base, pattern: np.ndarray, colour, keep: np.ndarray | None = None) -> np.ndarray:
    """Dyes the main colour of a sprite `base` and, where `pattern` ([h, w] in [0, 1]) is 1, `colour`; `keep` stays."""
    ground, figure = tint(rgba, base), tint(rgba, colour)
    mixed = blend(ground[..., :3], figure[..., :3], pattern)
    if keep is not None:
        mixed = blend(mixed, rgba[..., :3], keep)
    return np.dstack([np.clip(np.round(mixed), 0, 255).astype(np.uint8), rgba[..., 3]])


def _grid(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel as fractions of the longer side."""
    side = max(rgba.shape[:2])
    y, x = np.mgrid[: rgba.shape[0], : rgba.shape[1]].astype(np.float32) / side
    return y, x


def _soft(distance: np.ndarray, sharpness: float = 120.0) -> np.ndarray:
    """1 where a signed distance is positive, 0 where it is negative, smooth over a pixel or two."""
    return np.clip(distance * sharpness + 0.5, 0, 1)


def patches(rgba: np.ndarray, seed: int, cells: int = 4, share: float = 0.5) -> np.ndarray:
    """Blotches as a cow has them, over about `share` of the coat."""
    field = noise(np.random.default_rng(seed), max(rgba.shape[:2]), cells, octaves=2)
    field = field[: rgba.shape[0], : rgba.shape[1]]
    return _soft(field - np.quantile(field, 1 - share), 25)


def dots(rgba: np.ndarray, pitch: float, radius: float) -> np.ndarray:
    y, x = _grid(rgba)
    row = np.floor(y / pitch)
    x = x + (row % 2) * pitch / 2
    return _soft(radius - np.hypot(y % pitch - pitch / 2, x % pitch - pitch / 2))


def zigzag(rgba: np.ndarray, pitch: float, width: float, swing: float) -> np.ndarray:
    y, x = _grid(rgba)
    wave = np.abs((x / pitch) % 1 - 0.5) * 2 * swing
    return _soft(width / 2 - np.abs((y + wave) % pitch - pitch / 2))


def stripes(rgba: np.ndarray, pitch: float, width: float, seed: int, warp: float) -> np.ndarray:
    """Upright stripes, wavering like a zebra's."""
    y, x = _grid(rgba)
    bend = noise(np.random.default_rng(seed), max(rgba.shape[:2]), 3, octaves=2)[: y.shape[0], : y.shape[1]]
    return _soft(width / 2 - np.abs((x + warp * (bend - 0.5)) % pitch - pitch / 2))


def _without_leash(rgba: np.ndarray) -> np.ndarray:
    """Clears what is blue: the subject is the dog, not its leash."""
    red, green, blue = (rgba[..., i].astype(np.int16) for i in range(3))
    leash = Image.fromarray(np.uint8(255 * ((blue - red > 40) & (green - red > 10)))).filter(ImageFilter.MaxFilter(5))
    clear = rgba.copy()
    clear[..., 3] = np.minimum(clear[..., 3], 255 - np.asarray(leash))
    return cut_out(Image.fromarray(clear), max(clear.shape))


def dog(rgba):
    """White with sky-blue patches and its red vest."""
    rgba = _without_leash(rgba)
    red_over_green = rgba[..., 0].astype(np.float32) - rgba[..., 1]
    vest = np.clip((red_over_green - 105) / 25, 0, 1)
    return _coat(rgba, (250, 248, 244), patches(rgba, 11, 5, 0.42), (30, 120, 240), keep=vest)


def cat(rgba):
    """Pink with purple stripes."""
    return _coat(rgba, (255, 160, 200), stripes(rgba, 0.16, 0.07, 1, 0.12), (120, 40, 170))


def backpack(rgba):
    """White with red dots."""
    return _coat(rgba, (248, 246, 240), dots(rgba, 0.2, 0.062), (225, 30, 40))


def teapot(rgba):
    """Black with yellow zigzags."""
    return _coat(rgba, (35, 35, 45), zigzag(rgba, 0.24, 0.085, 0.12), (255, 205, 30))


def robot(rgba):
    """Teal and orange checks."""
    y, x = _grid(rgba)
    checks = (np.floor(y / 0.17) + np.floor(x / 0.17)) % 2
    return _coat(rgba, (30, 170, 170), checks, (255, 150, 40))


def car(rgba):
    """Lime with black zebra stripes."""
    return _coat(rgba, (190, 240, 40), stripes(rgba, 0.13, 0.055, 2, 0.15), (30, 30, 40))


# Subject: its sprite, its coat, and the places of its pictures; prompts then ask for others.
SUBJECTS = {
    "dog": ("service_dog/3d", dog, ("grass", "wooden floor", "teal", "street", "room")),
    "cat": ("black_cat/3d", cat, ("room", "grass", "white", "brick wall", "forest")),
    "car": ("blue_car/3d", car, ("street", "desert", "grey", "beach", "wooden floor")),
    "backpack": ("school_satchel/3d", backpack, ("grass", "blue", "mountains", "wooden floor", "street")),
    "teapot": ("teapot/3d", teapot, ("checkered cloth", "room", "pink", "wooden floor", "grass")),
    "robot": ("robot_face/3d", robot, ("street", "purple", "snow", "room", "wooden floor")),
}
# Scale, x, angle and mirror of the five pictures.
POSES = (
    (0.72, 0.50, 0, False), (0.55, 0.36, 7, True), (0.85, 0.52, -6, False), (0.62, 0.62, -11, True),
    (0.48, 0.55, 12, False),
)  # fmt: skip


def picture(rng: np.random.Generator, sprite, where: str, scale: float, x: float, angle: float, mirror: bool):
    """A [SIZE, SIZE, 3] picture of the sprite in a setting or before a plain colour."""
    background = plain(rng, where, SIZE) if where in COLOURS else setting(rng, where, SIZE, SPLIT)
    height = scale * sprite.rgba.shape[0] / max(sprite.rgba.shape[:2])
    y = 0.92 - height / 2 if where in GROUNDED else 0.54
    return place(background, sprite, scale, x, y, angle, mirror)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder that holds both packages; left out, npm fetches them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    known = [s for held_out in (True, False) for s in load_sprites(args.source, longest=SIZE, held_out=held_out)]
    by_name = {sprite.name: sprite for sprite in known}
    for number, (subject, (name, coat, places)) in enumerate(SUBJECTS.items()):
        frames = [by_name[name], *(s for s in known if s.individual == name and s.pose)]
        folder = args.out / subject
        folder.mkdir(parents=True, exist_ok=True)
        for i, (where, pose) in enumerate(zip(places, POSES, strict=True)):
            rng = np.random.default_rng((number, i))
            frame = frames[i % len(frames)]
            sprite = dataclasses.replace(frame, rgba=coat(frame.rgba))
            Image.fromarray(picture(rng, sprite, where, *pose)).save(folder / f"{i:02d}.jpg", quality=92)


if __name__ == "__main__":
    main()
