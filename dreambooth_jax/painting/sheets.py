"""Pictures out: PNG files that say how they were made, and labelled sheets of them."""

import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


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
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that `list_images` never sees what a kill may leave.
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        partial.write_bytes(encoded.getvalue())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def slug(prompt: str) -> str:
    """A file name in which a person recognises the prompt."""
    return re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:80] or "prompt"


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
    """Prompt -> a file name that a person recognises it in, numbered where several prompts would share one."""
    slugs = {prompt: slug(prompt) for prompt in prompts}
    shared = {name for name, times in Counter(slugs.values()).items() if times > 1}
    return {
        prompt: f"{name}_{number}" if name in shared else name for number, (prompt, name) in enumerate(slugs.items(), 1)
    }
