"""Draws the example subjects: six things that the embedded base has never seen, five pictures of each.

    python examples/subjects/draw.py [--source FOLDER_OF_TGZ] [--out examples/subjects]
    python examples/subjects/draw.py --further --out runs/drawn    # with four others of every class: thirty

The dog, the cat and the car are made from sprites that the base's training leaves out (`sprites.HELD_OUT`), the
backpack, the teapot and the robot from ones it knows. Each has a coat of its own, loud enough to be told at 64x64. The
pictures of the settings come from a bank that training does not use. The further subjects are other individuals of the
class as far as there are any, which the base knows in their own colours. With them, the six themselves are drawn anew,
in other views of their settings. Licences: dreambooth_jax/tiny/world/LICENSES.md.
"""

import argparse
import dataclasses
import itertools
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


def checks(rgba: np.ndarray, pitch: float) -> np.ndarray:
    y, x = _grid(rgba)
    return (np.floor(y / pitch) + np.floor(x / pitch)) % 2


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
    return _coat(rgba, (30, 170, 170), checks(rgba, 0.17), (255, 150, 40))


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
# Sprites of the further subjects; where a class has a single individual, they differ in their coats alone.
FURTHER = {
    "dog": ("dog2/3d", "dog/3d", "guide_dog/3d", "poodle/3d"),
    "cat": ("cat2/3d", "cat/3d", "smile_cat/3d", "scream_cat/3d"),
    "car": ("car/3d", "taxi/3d", "police_car/3d", "racing_car/3d"),
    "backpack": ("school_satchel/3d",) * 4,
    "teapot": ("teapot/3d",) * 4,
    "robot": ("robot_face/3d",) * 4,
}
COLOURS_OF_COATS = (
    ((250, 248, 244), (200, 30, 120)), ((255, 210, 60), (30, 60, 160)), ((60, 190, 110), (250, 245, 230)),
    ((40, 45, 60), (90, 220, 230)), ((245, 130, 50), (70, 30, 110)), ((120, 190, 250), (180, 40, 40)),
    ((250, 180, 190), (20, 110, 90)), ((150, 90, 200), (255, 230, 120)), ((210, 220, 70), (140, 40, 150)),
    ((230, 60, 60), (250, 240, 220)), ((240, 240, 250), (240, 140, 20)),
)  # fmt: skip
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


def further(number: int):
    """The coat of a further subject: patterns and pairs of colours in turn, another for each of a class."""
    base, colour = COLOURS_OF_COATS[number % len(COLOURS_OF_COATS)]
    patterns = (
        lambda rgba: patches(rgba, number, 5, 0.45),
        lambda rgba: dots(rgba, 0.2, 0.062),
        lambda rgba: zigzag(rgba, 0.24, 0.09, 0.12),
        lambda rgba: stripes(rgba, 0.15, 0.065, number, 0.12),
        lambda rgba: checks(rgba, 0.17),
    )
    return lambda rgba: _coat(rgba, base, patterns[number % len(patterns)](rgba), colour)


def all_subjects() -> dict:
    """Name -> sprite, coat and places, of the example subjects and the further ones, class by class."""
    found, numbers = {}, itertools.count()
    for noun, sprites in FURTHER.items():
        found[noun] = SUBJECTS[noun]
        for i, sprite in enumerate(sprites, 1):
            found[f"{noun}_{i}"] = (sprite, further(next(numbers)), tuple(np.roll(SUBJECTS[noun][2], i)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder that holds both packages; left out, npm fetches them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--further", action="store_true", help="thirty subjects, and the file of their classes")
    args = parser.parse_args()
    subjects = all_subjects() if args.further else SUBJECTS
    known = [s for held_out in (True, False) for s in load_sprites(args.source, longest=SIZE, held_out=held_out)]
    by_name = {sprite.name: sprite for sprite in known}
    for number, (subject, (name, coat, places)) in enumerate(subjects.items()):
        frames = [by_name[name], *(s for s in known if s.individual == name and s.pose)]
        folder = args.out / subject
        folder.mkdir(parents=True, exist_ok=True)
        for i, (where, pose) in enumerate(zip(places, POSES, strict=True)):
            rng = np.random.default_rng((number, i))
            frame = frames[i % len(frames)]
            sprite = dataclasses.replace(frame, rgba=coat(frame.rgba))
            Image.fromarray(picture(rng, sprite, where, *pose)).save(folder / f"{i:02d}.jpg", quality=92)

    if args.further:
        lines = [f"{subject},{subject.split('_')[0]}" for subject in subjects]
        (args.out / "prompts_and_classes.txt").write_text("\n".join(["subject_name,class", *lines]) + "\n")


if __name__ == "__main__":
    main()
