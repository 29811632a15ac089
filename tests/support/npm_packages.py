"""The three npm packages that the picture world reads, with a few synthetic sprites in their layout."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

from dreambooth_jax.tiny.world.sprites import FLUENT, MOVING, NOTO, tarball_name

# short_name, name, code point, category, subcategory
EMOJI = (
    ("dog", "DOG FACE", "1F436", "Animals & Nature", "animal-mammal"),
    ("dog2", "DOG", "1F415", "Animals & Nature", "animal-mammal"),
    ("service_dog", "SERVICE DOG", "1F415-200D-1F9BA", "Animals & Nature", "animal-mammal"),
    ("black_cat", "BLACK CAT", "1F408-200D-2B1B", "Animals & Nature", "animal-mammal"),
    ("teapot", "TEAPOT", "1FAD6", "Food & Drink", "drink"),
    ("eyeglasses", "EYEGLASSES", "1F453", "Objects", "clothing"),
    ("blue_car", "RECREATIONAL VEHICLE", "1F699", "Travel & Places", "transport-ground"),
    ("anchor", "ANCHOR", "2693-FE0F", "Travel & Places", "transport-water"),
    ("hearts", "BLACK HEART SUIT", "2665-FE0F", "Activities", "game"),
    ("jp", "REGIONAL INDICATOR SYMBOL LETTERS JP", "1F1EF-1F1F5", "Flags", "country-flag"),
    ("wave", "WAVING HAND SIGN", "1F44B", "People & Body", "hand-fingers-open"),
)


def _picture(side: int, number: int, file_format: str) -> bytes:
    image = Image.new("RGBA", (side, side))
    box = (side // 8, side // 4, side - side // 8, side - side // 4)
    ImageDraw.Draw(image).ellipse(box, fill=(20 * number, 220 - 20 * number, 120, 255))
    data = io.BytesIO()
    image.save(data, file_format)
    return data.getvalue()


# Short names with an animation: of so many different frames, each shown twice.
MOVES = {"dog2": 6, "black_cat": 3, "jp": 2}


def _animation(number: int, frames: int) -> bytes:
    pictures = []
    for frame in range(frames):
        image = Image.new("RGBA", (256, 256))
        box = (10 + 12 * frame, 60, 110 + 24 * frame, 200 - 14 * frame)
        ImageDraw.Draw(image).ellipse(box, fill=(20 * number, 220 - 20 * number, 120, 255))
        pictures += [image, image]
    data = io.BytesIO()
    pictures[0].save(data, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    return data.getvalue()


def _write_package(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_packages(folder: Path) -> Path:
    """Writes the tarballs and returns the folder."""
    keys = ("short_name", "name", "unified", "category", "subcategory")
    metadata = [dict(zip(keys, emoji, strict=True)) | {"non_qualified": None} for emoji in EMOJI]
    codes = [emoji[2].lower() for emoji in EMOJI]
    fluent = {f"assets/{code}.webp": _picture(256, i, "WEBP") for i, code in enumerate(codes)}
    noto = {f"img/google/64/{code}.png": _picture(64, i, "PNG") for i, code in enumerate(codes)}
    moving = {
        f"assets/{emoji[2].lower()}.webp": _animation(i, MOVES[emoji[0]])
        for i, emoji in enumerate(EMOJI)
        if emoji[0] in MOVES
    }
    _write_package(folder / tarball_name(MOVING), moving)
    _write_package(folder / tarball_name(FLUENT), fluent | {"README.md": b"pictures"})
    _write_package(folder / tarball_name(NOTO), {"emoji.json": json.dumps(metadata).encode()} | noto)
    return folder
