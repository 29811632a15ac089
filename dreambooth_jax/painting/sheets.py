"""Pictures out: rows of them painted, PNG files with their making in text chunks, labelled sheets."""

import io
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter, Request


def paint_rows(
    paint: Painter,
    params: Params,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str = "",
    each: Callable[[str, int, np.ndarray], None] = lambda prompt, seed, image: None,
) -> list[list[np.ndarray]]:
    """Paints one row of pictures per prompt, one column per seed; a seed has the same noise in every row.

    Args:
        each: called with (prompt, seed, image) as soon as a picture is done.

    Returns:
        uint8[h w 3] per picture.
    """
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    requests = [Request(prompt, negative, jax.random.key(seed)) for prompt, seed in wanted]
    painted = {}
    for number, image in paint(params, requests):
        each(*wanted[number], image)
        painted[number] = image
    return [[painted[row * len(seeds) + column] for column in range(len(seeds))] for row in range(len(prompts))]


def text_chunks(path: epath.Path) -> dict[str, str]:
    """The text chunks of a PNG that `save_png` wrote; empty for one that cannot be read."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return dict(getattr(image, "text", {}))
    except OSError:
        return {}


def save_png(path: str | os.PathLike, image: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Writes uint8[h w 3] as a PNG with text chunks, whole or not at all: a killed run leaves no half picture.

    Raises:
        ValueError: the image is not uint8[h w 3].
        OSError: the folder cannot be written.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"{path}: an image must be uint8[h w 3], got {image.dtype}{list(image.shape)}")
    info = PngImagePlugin.PngInfo()
    for key, text in metadata.items():
        info.add_text(key, text)
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", pnginfo=info)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encoded.getvalue())


def save_sheet(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    metadata: Mapping[str, str],
    columns: Sequence[str] = (),
) -> None:
    """Writes rows of pictures as one labelled PNG."""
    save_png(path, contact_sheet(rows, labels, columns), metadata)


def slug(prompt: str, most_bytes: int = 100) -> str:
    """A file name in which a person recognises the prompt, cut to `most_bytes` of UTF-8: file systems allow 255."""
    name = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_").encode()[:most_bytes].decode(errors="ignore")
    return name.strip("_") or "prompt"


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], columns: Sequence[str] = ()
) -> np.ndarray:
    """Lays images out in rows, each under its label, wrapped to the sheet's width; `columns` are written on top.

    Args:
        rows: images uint8[h w 3], all of one size; rows may differ in length.
        labels: one per row, for example the prompt.
        columns: one per column, for example the seed; or none.

    Returns:
        uint8[H W 3].

    Raises:
        ValueError: no images, images of different sizes, or a wrong number of labels.
    """
    sizes = {image.shape for row in rows for image in row}
    width = max((len(row) for row in rows), default=0)
    if len(sizes) != 1 or len(labels) != len(rows) or len(columns) not in (0, width):
        raise ValueError(
            f"a contact sheet takes images of one size and a label per row (and column), got sizes {sorted(sizes)}, "
            f"{len(rows)} rows with {len(labels)} labels, {width} columns with {len(columns)} labels"
        )
    w = sizes.pop()[1]
    gap = max(4, w // 32)
    font = ImageFont.load_default(max(12, w // 20))
    full = width * (w + gap) - gap
    strips = [_row_strip([_text_strip(text, w, font) for text in columns], gap, full)] if columns else []
    for label, row in zip(labels, rows, strict=True):
        strips += [_text_strip(label, full, font), _row_strip(row, gap, full)]
    framed = [np.pad(strip, ((gap, 0), (gap, gap), (0, 0)), constant_values=255) for strip in strips]
    return np.pad(np.concatenate(framed), ((0, gap), (0, 0), (0, 0)), constant_values=255)


def framed(image: np.ndarray, side: int) -> np.ndarray:
    """The picture made to fit in a white square, uint8[side side 3]; a square of that side as it is."""
    if image.shape[:2] == (side, side):
        return image
    white = Image.new("RGB", (side, side), "white")
    small = ImageOps.contain(Image.fromarray(image), (side, side), Image.Resampling.LANCZOS)
    white.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return np.asarray(white)


def _row_strip(images: Sequence[np.ndarray], gap: int, width: int) -> np.ndarray:
    height = max((image.shape[0] for image in images), default=0)
    strip = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for image in images:
        strip[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return strip


def _text_strip(text: str, width: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Black text on white, uint8[h width 3], broken into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if not lines[-1] or font.getlength(longer) <= width else [lines[-1], word]
    spacing = sum(font.getmetrics())
    image = Image.new("RGB", (width, spacing * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, i * spacing), line, fill="black", font=font)
    return np.asarray(image)


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """Prompt -> its file name, with a number where several prompts would share one.

    Names differ in more than upper and lower case and Unicode form: some file systems know no difference.
    """
    slugs = {prompt: slug(prompt) for prompt in prompts}
    folded = {prompt: unicodedata.normalize("NFC", name).casefold() for prompt, name in slugs.items()}
    shared = {name for name, times in Counter(folded.values()).items() if times > 1}
    taken = {name for name in folded.values() if name not in shared}
    names = {}
    for prompt, name in slugs.items():
        if folded[prompt] in shared:
            number = next(n for n in itertools.count(1) if f"{folded[prompt]}_{n}" not in taken)
            taken.add(f"{folded[prompt]}_{number}")
            name = f"{name}_{number}"
        names[prompt] = name
    return names
