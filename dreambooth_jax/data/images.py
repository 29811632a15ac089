"""Photos in, training examples out.

    folder or tfds:NAME:SPLIT ──> decode, orient, to sRGB on white ──> square views + captions ──> Examples

A subject is a handful of images, so they are all read before anything slow starts, and everything that is wrong
with them is said at once. The images are later encoded once and stay on the devices; augmentation therefore
happens here, as `views` pre-drawn crops and flips of each image.
"""

import io
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageCms, ImageOps

from dreambooth_jax.data.captions import fill, raise_listing
from dreambooth_jax.data.sources import MASK_ENDING, Item, list_source, report

FORMATS = ("JPEG", "PNG", "WEBP")


class Examples(NamedTuple):
    """Training examples. The views of one image follow each other: image i, view v is row i * views + v."""

    images: np.ndarray  # uint8[n h w 3], sRGB
    captions: tuple[str, ...]
    names: tuple[str, ...]  # the file name, or NAME:SPLIT#index
    original: np.ndarray  # int32[n 2], height and width before resizing
    crop: np.ndarray  # int32[n 2], top and left of the crop in the resized (and mirrored) image
    notes: tuple[str, ...] = ()  # lines for the plan: what the source holds besides
    masks: np.ndarray | None = None  # uint8[n h w], 255 where the loss counts


def read_examples(
    source: str | os.PathLike,
    resolution: int,
    *,
    template: str,
    identifier: str,
    class_noun: str,
    captions: str = "auto",
    crop: str = "center",
    flip: bool = False,
    views: int = 1,
    seed: int = 0,
    masked: bool = False,
) -> Examples:
    """Reads every image of a folder or TFDS split as square crops with captions.

    The short side is resized to `resolution` pixels (Lanczos) and a square is cut out of the long side. The draws of
    random crop and flip depend only on (seed, image name), not on the order or number of the images; of two
    consecutive views exactly one is flipped.

    Args:
      source: a folder, `hub:OWNER/NAME[@REVISION][/FOLDER]`, or `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]`;
        SPLIT may slice (`train[:5]`), and DIR defaults to the environment variable TFDS_DATA_DIR.
      resolution: side of the square, in pixels.
      template: caption of images without their own, e.g. "a photo of {identifier} {class_noun}".
      identifier: fills {identifier} in the template and in captions.
      class_noun: fills {class_noun}.
      captions: "auto" takes the source's own captions where it has any (sidecar `dog.txt` for `dog.jpg`,
        `metadata.jsonl` with `file_name` and `text`, TFDS text feature `caption` or `text`); then every image must
        have one. "template" ignores them.
      crop: "center" or "random".
      flip: mirrors half of the views left to right.
      views: number of augmented views per image.
      seed: of the random crops and flips.
      masked: reads masks: `dog-masklabel.png` for `dog.jpg`, or the image's transparency.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: a bad argument, template or caption, no images, or images that cannot be read: all of them are listed.
    """
    _check_arguments(resolution, captions, crop, flip, views)
    fill(template, identifier, class_noun, "the caption template")
    listing = list_source(source, captions)
    items = listing.items
    texts = _captions(items, captions, template, identifier, class_noun, source)
    read = _read_squares(items, resolution, crop, flip, views, seed, source, masked)
    squares, sizes, corners, masks = zip(*read, strict=True)
    names = tuple(item.name for item in items for _ in range(views))
    if masked and all(mask.min() == 255 for mask in masks):
        raise ValueError(
            f"masked_loss = True, but no image in {source} has a mask: NAME{MASK_ENDING}.png, white where the subject "
            "is, or transparency around it"
        )
    return Examples(
        images=np.stack(squares),
        captions=tuple(text for text in texts for _ in range(views)),
        names=names,
        original=np.array(sizes, np.int32),
        crop=np.array(corners, np.int32),
        notes=(*report(listing), *_crop_notes(dict(zip(names, sizes, strict=True)), crop)),
        masks=np.stack(masks) if masked else None,
    )


def join(parts: Sequence[Examples]) -> Examples:
    """The examples of several sources as one."""
    fields = zip(*parts, strict=True)
    return Examples(*(_concatenated(f) for f in fields))


def _concatenated(field: tuple) -> Any:
    if field[0] is None:
        return None
    return np.concatenate(field) if isinstance(field[0], np.ndarray) else sum(field, ())


def _crop_notes(sizes: Mapping[str, tuple[int, int]], crop: str) -> list[str]:
    """What the square leaves of images that are not square; name -> (height, width)."""
    cut = []
    for name, (height, width) in sizes.items():
        if share := round(100 * (1 - min(height, width) / max(height, width))):
            cut.append(f"{name} ({width} x {height}) loses {share} % of its {'width' if width > height else 'height'}")
    where = "at both ends" if crop == "center" else "at random ends"
    return [f"cropped to squares, {where}: {'; '.join(cut)}"] if cut else []


def _check_arguments(resolution: int, captions: str, crop: str, flip: bool, views: int) -> None:
    if resolution < 1 or views < 1:
        raise ValueError(f"resolution and views must be positive, got resolution={resolution}, views={views}")
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if captions not in ("auto", "template"):
        raise ValueError(f"captions must be 'auto' or 'template', got {captions!r}")
    if views > 1 and crop == "center" and not flip:
        raise ValueError(
            f"views={views} of a centre crop without flip are the same picture: set crop='random' or flip, or views=1"
        )


def _captions(
    items: Sequence[Item], captions: str, template: str, identifier: str, class_noun: str, source: str | os.PathLike
) -> list[str]:
    own = [" ".join((item.caption or "").split()) if captions == "auto" else "" for item in items]
    missing = [item.name for item, text in zip(items, own, strict=True) if not text]
    if any(own) and missing:
        raise ValueError(
            f"{source}: {len(missing)} of {len(items)} images have no caption while the others have one: "
            f"{', '.join(missing)}. Give every image a .txt file or a metadata.jsonl line, or set captions='template'."
        )
    return [fill(text or template, identifier, class_noun, item.name) for item, text in zip(items, own, strict=True)]


# --- pixels


def check_headers(items: Sequence[Item], source: str) -> None:
    """Opens images as far as their size, which is cheap.

    Raises:
      ValueError: some of them cannot be opened; they are listed.
    """
    bad = {}
    for item in items:
        try:
            Image.open(io.BytesIO(item.read())).close()
        except Exception as error:  # as in `_read_squares`
            bad[item.name] = _reason(error)
    if bad:
        raise_listing(f"{len(bad)} of {len(items)} images in {source} cannot be read", bad, "Replace or remove them.")


def _read_squares(
    items: Sequence[Item],
    resolution: int,
    crop: str,
    flip: bool,
    views: int,
    seed: int,
    source: str | os.PathLike,
    masked: bool,
) -> list[tuple[np.ndarray, tuple[int, int], tuple[int, int], np.ndarray | None]]:
    """(square, size of the image, corner of the square, square of the mask) of every view."""
    squares, bad, small = [], {}, []
    for item in items:
        try:
            data = item.read()
            image = decode_image(data)
            mask = read_mask(item, data, image.size) if masked else None
        except Exception as error:  # whatever a decoder trips over belongs on the list
            bad[item.name] = _reason(error)
            continue
        if min(image.size) < resolution:
            small.append(f"{item.name} ({image.width} x {image.height})")
        for view in _draw_views(item.name, crop, flip, views, seed):
            squares.append(
                (*_square(image, resolution, *view), None if mask is None else _square(mask, resolution, *view)[0])
            )
    if bad:
        raise_listing(f"{len(bad)} of {len(items)} images in {source} cannot be read", bad, "Replace or remove them.")
    if small:
        logging.warning(
            "%d images are smaller than %d pixels and were enlarged: %s", len(small), resolution, ", ".join(small)
        )
    return squares


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright 8-bit sRGB image, transparency on white.

    Of an animation, the first frame.

    Raises:
      OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: no complete image of these kinds, or more
        than 2 x PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on, which a 108-megapixel phone reaches; the limit itself still raises.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def read_mask(item: Item, data: bytes, size: tuple[int, int]) -> Image.Image:
    """The mask of an image, mode L: its own mask file, else its opacity.

    Args:
      data: the encoded image.
      size: width and height of the upright image.

    Raises:
      ValueError: the mask is empty or has another shape than the image.
      OSError: it cannot be decoded.
    """
    if item.mask is not None:
        mask = decode_image(item.mask()).convert("L")
        if abs(mask.width * size[1] - mask.height * size[0]) > max(*mask.size, *size):
            raise ValueError(f"its mask is {mask.width} x {mask.height}, another shape than {size[0]} x {size[1]}")
        mask = mask.resize(size)
    else:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))
        opaque = Image.new("L", size, 255)
        mask = image.convert("RGBA").getchannel("A") if image.has_transparency_data else opaque
    if not mask.getbbox():
        raise ValueError("its mask is empty")
    return mask


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Applies the embedded colour profile: phones save Display P3, print shops CMYK."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        srgb = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=mode)
        return srgb or image
    except (ImageCms.PyCMSError, OSError):
        return image  # a damaged or mismatched profile: show the stored values, as every viewer does


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return f"{type(error).__name__}: {error}"


def _draw_views(name: str, crop: str, flip: bool, views: int, seed: int) -> list[tuple[float, bool]]:
    """Per view the crop's place along the long side, in [0, 1], and whether it is mirrored."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    first = int(rng.integers(2))
    places = rng.random(views) if crop == "random" else np.full(views, 0.5)
    return [(float(place), flip and (first + view) % 2 == 1) for view, place in enumerate(places)]


def _square(
    image: Image.Image, resolution: int, place: float, mirrored: bool
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    side = min(image.size)
    left, top = (image.width - side) * place, (image.height - side) * place
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    corner = round(top * resolution / side), round(abs(left - mirrored * (image.width - side)) * resolution / side)
    return np.asarray(ImageOps.mirror(square) if mirrored else square), (image.height, image.width), corner
