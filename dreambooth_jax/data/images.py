"""Photos in, training examples out.

    folder or tfds:NAME:SPLIT ──> decode, orient, to sRGB on white ──> cropped views + captions ──> Examples

A subject is a handful of images: all are read before anything slow starts, and one error lists every problem. Each
image is encoded once and stays on the devices, so augmentation is done here, as `views` pre-drawn crops and flips of
each image.
"""

import hashlib
import io
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageCms, ImageOps

from dreambooth_jax.data.buckets import Size, nearest, text_of
from dreambooth_jax.data.captions import fill, raise_listing
from dreambooth_jax.data.sources import MASK_ENDING, Item, list_source, report

FORMATS = ("JPEG", "PNG", "WEBP")


class Examples(NamedTuple):
    """Training examples of one shape. The views of one image follow each other."""

    images: np.ndarray  # uint8[n h w 3], sRGB
    captions: tuple[str, ...]
    names: tuple[str, ...]  # the file name, or NAME:SPLIT#index
    original: np.ndarray  # int32[n 2], height and width before resizing
    crop: np.ndarray  # int32[n 2], top and left of the crop in the resized (and mirrored) image
    notes: tuple[str, ...] = ()  # lines for the plan: what the source holds besides
    masks: np.ndarray | None = None  # uint8[n h w], 255 where the loss counts


def read_examples(source: str | os.PathLike, resolution: int, **options: Any) -> Examples:
    """Reads every image of a source as square crops with captions; `options` and errors are `read_buckets`'s.

    Args:
      resolution: side of the square, in pixels.
    """
    (examples,) = read_buckets(source, ((resolution, resolution),), **options)
    return examples


def read_buckets(
    source: str | os.PathLike,
    sizes: Sequence[Size],
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
) -> tuple[Examples, ...]:
    """Reads every image of a folder or data set as crops of the nearest of some shapes, with captions.

    An image is resized (Lanczos) to the smallest size that covers the shape whose ratio is nearest to its own, and its
    longer side is cropped. The draws of random crop and flip depend only on (seed, image name), not on the order or
    number of the images; of two consecutive views exactly one is flipped.

    Args:
      source: a folder, `hub:OWNER/NAME[@REVISION][/FOLDER]`, or `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]`;
        SPLIT may slice (`train[:5]`), and DIR defaults to the environment variable TFDS_DATA_DIR.
      sizes: (height, width) of the shapes, in pixels.
      template: caption of images without their own, e.g. "a photo of {identifier} {class_noun}".
      identifier: fills {identifier} in the template and in captions.
      class_noun: fills {class_noun}.
      captions: "auto" takes the source's own captions where it has any (sidecar `dog.txt` for `dog.jpg`,
        `metadata.jsonl` with `file_name` and `text`, TFDS text feature `caption` or `text`); then every image must
        have one. "template" ignores them.
      crop: "center" or "random".
      flip: mirrors half of the views left to right.
      views: number of augmented views per image.
      seed: seed of the random crops and flips.
      masked: reads masks: `dog-masklabel.png` for `dog.jpg`, or the image's transparency.

    Returns:
      The examples of every shape that some image has, in the order of `sizes`.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: a bad argument, template or caption, no images, or images that cannot be read: all of them are listed.
    """
    _check_arguments(min(min(size) for size in sizes), captions, crop, flip, views)
    fill(template, identifier, class_noun, "the caption template")
    listing = list_source(source, captions)
    texts = _captions(listing.items, captions, template, identifier, class_noun, source)
    rows = _read_views(listing.items, texts, sizes, crop, flip, views, seed, source, masked)
    if masked and all(row.mask.min() == 255 for row in rows):
        raise ValueError(
            f"masked_loss = True, but no image in {source} has a mask: NAME{MASK_ENDING}.png, white where the subject "
            "is, or transparency around it"
        )
    by_size = {size: [row for row in rows if row.image.shape[:2] == size] for size in sizes}
    buckets = [_examples(found, crop, named=len(sizes) > 1) for found in by_size.values() if found]
    first = buckets[0]
    notes = (*report(listing), *_remarks(rows), *([] if masked else _idle_masks(listing.items)), *first.notes)
    return first._replace(notes=notes), *buckets[1:]


class _View(NamedTuple):
    """A view of an image: its crop, the place of the crop, and the caption."""

    name: str
    caption: str
    digest: bytes  # of its file
    animated: bool
    image: np.ndarray  # uint8[h w 3]
    original: tuple[int, int]  # height, width
    corner: tuple[int, int]  # top, left
    mask: np.ndarray | None  # uint8[h w]
    moved: bool  # whether the crop was moved to the mask


def _remarks(rows: Sequence[_View]) -> list[str]:
    """What the files of images hold less than their number says, in words."""
    notes = []
    if plain := dict.fromkeys(row.name for row in rows if is_plain(row.image)):
        notes.append(f"of one colour, with nothing to learn: {', '.join(plain)}")
    if animated := dict.fromkeys(row.name for row in rows if row.animated):
        notes.append(f"animations, of which the first picture is used: {', '.join(animated)}")
    if moved := dict.fromkeys(row.name for row in rows if row.moved):
        notes.append(f"crops moved to the masks that lay outside of them: {', '.join(moved)}")
    same: dict[bytes, dict[str, None]] = {}
    for row in rows:
        same.setdefault(row.digest, {})[row.name] = None
    return notes + [
        f"one file under {len(names)} names: {', '.join(names)}" for names in same.values() if len(names) > 1
    ]


def _idle_masks(items: Sequence[Item]) -> list[str]:
    names = dict.fromkeys(item.name for item in items if item.mask is not None)
    return [f"not used: masks of {', '.join(names)}: only masked_loss reads the masks of photos"] if names else []


def _examples(rows: Sequence[_View], crop: str, *, named: bool) -> Examples:
    """The views of one shape; notes begin with the shape if it is `named`."""
    size = rows[0].image.shape[:2]
    originals = {row.name: row.original for row in rows}
    cut = _cut_off(originals, size, crop)
    notes = [f"cropped to squares, {cut}"] if cut else []
    if named:
        count = f"{len(originals)} image{'s' * (len(originals) > 1)}"
        notes = [f"bucket {text_of(size)}: {count}" + (f", cropped {cut}" if cut else "")]
    return Examples(
        images=np.stack([row.image for row in rows]),
        captions=tuple(row.caption for row in rows),
        names=tuple(row.name for row in rows),
        original=np.array([row.original for row in rows], np.int32),
        crop=np.array([row.corner for row in rows], np.int32),
        notes=tuple(notes),
        masks=None if rows[0].mask is None else np.stack([row.mask for row in rows]),
    )


def join(parts: Sequence[Examples]) -> Examples:
    """The examples of several sources as one."""
    fields = zip(*parts, strict=True)
    return Examples(*(_concatenated(f) for f in fields))


def _concatenated(field: tuple) -> Any:
    if field[0] is None:
        return None
    return np.concatenate(field) if isinstance(field[0], np.ndarray) else sum(field, ())


def _cut_off(originals: Mapping[str, tuple[int, int]], size: Size, crop: str) -> str:
    """What a crop to the shape `size` cuts off images of other ratios, in words; name -> (height, width)."""
    cut = []
    for name, (height, width) in originals.items():
        kept = _kept(width, height, size)
        if share := round(100 * (1 - kept[0] / width * kept[1] / height)):
            cut.append(f"{name} ({width} x {height}) loses {share} % of its {'width' if kept[0] < width else 'height'}")
    return f"at {'both' if crop == 'center' else 'random'} ends: {'; '.join(cut)}" if cut else ""


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
        except Exception as error:  # as in `_read_views`
            bad[item.name] = reason(error)
    refuse_unreadable(bad, len(items), source)


def _read_views(
    items: Sequence[Item],
    texts: Sequence[str],
    sizes: Sequence[Size],
    crop: str,
    flip: bool,
    views: int,
    seed: int,
    source: str | os.PathLike,
    masked: bool,
) -> list[_View]:
    """All views of all images, each in the shape nearest to its image's."""
    rows, bad, small = [], {}, []
    for item, text in zip(items, texts, strict=True):
        try:
            data = item.read()
            image = decode_image(data)
            mask = read_mask(item, data, image.size) if masked else None
            about = item.name, text, hashlib.blake2b(data).digest(), is_animated(data)
        except Exception as error:  # decoders' errors have no common type; the list takes all
            bad[item.name] = reason(error)
            continue
        size = nearest(sizes, image.height, image.width)
        if image.height < size[0] or image.width < size[1]:
            small.append(f"{item.name} ({image.width} x {image.height})")
        for place, mirrored in _draw_views(item.name, crop, flip, views, seed):
            own = None if mask is None else _cropped(mask, size, place, mirrored)[0]
            if outside := own is not None and not own.any():
                place = _place_around(mask.getbbox(), mask.size, size)
                own = _cropped(mask, size, place, mirrored)[0]
            if outside and not own.any():
                bad[item.name] = f"its mask is too small to be seen in {text_of(size)} pixels"
                break
            rows.append(_View(*about, *_cropped(image, size, place, mirrored), own, outside))
    refuse_unreadable(bad, len(items), source)
    if small:
        needed = f"{min(min(size) for size in sizes)} pixels" if len(sizes) == 1 else "their shapes"
        logging.warning("%d images are smaller than %s and were enlarged: %s", len(small), needed, ", ".join(small))
    return rows


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright 8-bit sRGB image, transparency on white.

    Of an animation, the first frame.

    Raises:
      OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: no complete image of these kinds, or more
        than 2 x PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    image = _open(data)
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on, which a 108-megapixel phone reaches; the limit itself still raises.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def is_animated(data: bytes) -> bool:
    """Whether an encoded image is a moving one; a phone's JPEG with a preview behind it is not."""
    with _open(data) as image:
        return image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1


def is_plain(image: np.ndarray) -> bool:
    """Whether a picture [h, w, 3] is of one colour."""
    return bool((image == image[:1, :1]).all())


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
        image = ImageOps.exif_transpose(_open(data))
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


def refuse_unreadable(bad: Mapping[str, str], count: int, source: str | os.PathLike) -> None:
    """Raises ValueError that lists the images of a source that cannot be read, if there are any.

    Args:
      bad: name -> reason.
      count: number of images of the source.
    """
    if bad:
        raise_listing(f"{len(bad)} of {count} images in {source} cannot be read", bad, "Replace or remove them.")


def reason(error: Exception) -> str:
    """An error of a decoder in words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return f"{type(error).__name__}: {error}"


def _draw_views(name: str, crop: str, flip: bool, views: int, seed: int) -> list[tuple[float, bool]]:
    """The place of each view's crop along the long side, in [0, 1], and whether the view is mirrored."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    first = int(rng.integers(2))
    places = rng.random(views) if crop == "random" else np.full(views, 0.5)
    return [(float(place), flip and (first + view) % 2 == 1) for view, place in enumerate(places)]


def _place_around(box: tuple[int, int, int, int], whole: tuple[int, int], size: Size) -> float:
    """The place of the crop whose middle is nearest to that of a box.

    Args:
        box: left, top, right and bottom in the picture.
        whole: width and height of the picture.
    """
    places = [0.5]
    for first, last, length, kept in zip(box[:2], box[2:], whole, _kept(*whole, size), strict=True):
        if length - kept >= 1:
            places = [((first + last) / 2 - kept / 2) / (length - kept)]
    return min(1.0, max(0.0, places[0]))


def _kept(width: int, height: int, size: Size) -> tuple[float, float]:
    """Width and height of the largest part of a picture that has the ratio of `size`."""
    return min(float(width), height * size[1] / size[0]), min(float(height), width * size[0] / size[1])


def _cropped(
    image: Image.Image, size: Size, place: float, mirrored: bool
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """The crop, the image's height and width, and the crop's top and left in the resized (and mirrored) image."""
    width, height = _kept(*image.size, size)
    left, top = (image.width - width) * place, (image.height - height) * place
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    part = image.resize(size[::-1], Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    corner = (
        round(top * size[0] / height),
        round(abs(left - mirrored * (image.width - width)) * size[1] / width),
    )
    return np.asarray(ImageOps.mirror(part) if mirrored else part), (image.height, image.width), corner
