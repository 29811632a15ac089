"""Photos in, training examples out.

    folder or tfds:NAME:SPLIT ──> decode, orient, to sRGB on white ──> square views + captions ──> Examples

A subject is a handful of images, so they are all read before anything slow starts, and everything that is wrong
with them is said at once. The images are later encoded once and stay on the devices; augmentation therefore
happens here, as `views` pre-drawn crops and flips of each image.
"""

import io
import json
import os
import re
import string
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from PIL import Image, ImageCms, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Pictures that are not read. Skipping them like a README would drop a person's photos in silence.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".dng", ".cr2", ".nef")
CAPTION_FIELDS = ("identifier", "class_noun")


class Examples(NamedTuple):
    """Training examples. The views of one image follow each other: image i, view v is row i * views + v."""

    images: np.ndarray  # uint8[n h w 3], sRGB
    captions: tuple[str, ...]
    names: tuple[str, ...]  # the file name, or NAME:SPLIT#index


class _Item(NamedTuple):
    name: str
    read: Callable[[], bytes]  # the encoded image
    caption: str | None


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
) -> Examples:
    """Reads every image of a folder or TFDS split as square crops with captions.

    The short side is resized to `resolution` pixels (Lanczos) and a square is cut out of the long side. The draws of
    random crop and flip depend only on (seed, image name), not on the order or number of the images; of two
    consecutive views exactly one is flipped.

    Args:
      source: a folder, or `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]`; SPLIT may slice (`train[:5]`), and DIR
        defaults to the environment variable TFDS_DATA_DIR. The split must be stored as ArrayRecord.
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

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: a bad argument, template or caption, no images, or images that cannot be read: all of them are listed.
    """
    _check_arguments(resolution, captions, crop, flip, views)
    _fill(template, identifier, class_noun, "the caption template")
    items = _tfds_items(os.fspath(source)) if os.fspath(source).startswith("tfds:") else _folder_items(source)
    texts = _captions(items, captions, template, identifier, class_noun, source)
    squares = _read_squares(items, resolution, crop, flip, views, seed, source)
    return Examples(
        images=np.stack(squares),
        captions=tuple(text for text in texts for _ in range(views)),
        names=tuple(item.name for item in items for _ in range(views)),
    )


def list_images(folder: str | os.PathLike) -> list[epath.Path]:
    """The JPEG, PNG and WebP files directly in `folder`, sorted by name; none where the folder does not exist.

    Hidden files and files that are no images are skipped.

    Raises:
      ValueError: the folder holds pictures of a kind that is not read (HEIC, TIFF, ...); all of them are listed.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    visible = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    foreign = [p.name for p in visible if p.suffix.lower() in FOREIGN_SUFFIXES]
    if foreign:
        raise ValueError(
            f"{folder}: these pictures are not JPEG, PNG or WebP; convert or remove them: {', '.join(foreign)}"
        )
    return [p for p in visible if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def _check_arguments(resolution, captions, crop, flip, views) -> None:
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


def _raise_listing(problem: str, reasons: Mapping[str, str], remedy: str) -> None:
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"{problem}:\n{lines}\n{remedy}")


# --- sources


def _folder_items(source: str | os.PathLike) -> list[_Item]:
    folder = epath.Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No image folder {folder}. Give an existing folder with 3-5 JPEG, PNG or WebP photos, or tfds:NAME:SPLIT."
        )
    paths = list_images(folder)
    if not paths:
        raise ValueError(
            f"{folder} holds no images. Put JPEG, PNG or WebP files directly in it (subfolders are not searched)."
        )
    texts = _folder_captions(folder, paths)
    return [_Item(path.name, path.read_bytes, texts.get(path.name)) for path in paths]


def _folder_captions(folder: epath.Path, paths: Sequence[epath.Path]) -> dict[str, str]:
    metadata = folder / "metadata.jsonl"
    sidecars = {path.name: side for path in paths if (side := path.with_suffix(".txt")).exists()}
    if metadata.exists() and sidecars:
        raise ValueError(f"{folder} has captions twice, in metadata.jsonl and in .txt files: remove one of them")
    if metadata.exists():
        return _metadata_captions(metadata, {path.name for path in paths})
    return {name: _read_text(side) for name, side in sidecars.items()}


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors put a byte-order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _metadata_captions(path: epath.Path, names: set[str]) -> dict[str, str]:
    """Reads {"file_name": ..., "text": ...} lines, the layout of Hugging Face's imagefolder."""
    texts, bad = {}, {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            bad[f"line {number}"] = f"{type(error).__name__}: {error}"
            continue
        if name not in names:
            bad[f"line {number}"] = f"there is no image {name!r} in this folder"
        elif not isinstance(text, str):
            bad[f"line {number}"] = f"text is {text!r}, not a string"
        texts[name] = text
    if bad:
        _raise_listing(
            f"{path} has unusable lines", bad, 'Each line must be {"file_name": "dog.jpg", "text": "a caption"}.'
        )
    return texts


def _tfds_items(source: str) -> list[_Item]:
    match = re.fullmatch(r"tfds:([^:?]+(?::\d[^:?]*)?):([^?]+)(?:\?data_dir=(.+))?", source)
    if not match:
        raise ValueError(f"{source!r} is not of the form tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]")
    name, split, data_dir = match.groups()
    records, image_key, caption_key = _open_tfds(name, split, data_dir or os.environ.get("TFDS_DATA_DIR"))
    items = []
    for i in range(len(records)):
        record = records[i]
        caption = record[caption_key].decode() if caption_key else None
        items.append(_Item(f"{name}:{split}#{i}", lambda data=record[image_key]: data, caption))
    if not items:
        raise ValueError(f"{source} holds no images: choose another split or slice")
    return items


def _open_tfds(name: str, split: str, data_dir: str | None):
    """The random-access records of a split with images left encoded, its image key and its caption key or None."""
    try:
        import tensorflow_datasets as tfds  # slow to import, and only these sources need it
    except ImportError as error:
        raise ImportError("tfds: sources need: pip install tensorflow-datasets array_record") from error
    try:
        records = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except (tfds.core.DatasetNotFoundError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"TFDS has no {name} stored as ArrayRecord under {data_dir or '~/tensorflow_datasets'}. Prepare it once "
            f"where TensorFlow is installed, `tfds build {name} --file_format=array_record`, and give the folder that "
            "it wrote to as ?data_dir= or in TFDS_DATA_DIR."
        ) from error
    features = records.dataset_info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    image_key = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image_key is None:
        raise ValueError(
            f"TFDS {name} has no feature `image` and not exactly one image feature; its image features are {images}"
        )
    if features[image_key].np_dtype == np.float32:
        raise ValueError(f"TFDS {name}: feature {image_key!r} holds float32 values, not pictures")
    texts = [key for key in ("caption", "text") if key in features and isinstance(features[key], tfds.features.Text)]
    # TFDS's own decoder ignores orientation, palettes and transparency; ours reads the same bytes as from a file.
    records.decoders = {key: tfds.decode.SkipDecoding() for key in images}
    return records, image_key, texts[0] if texts else None


# --- captions


def _captions(
    items: Sequence[_Item], captions: str, template: str, identifier: str, class_noun: str, source
) -> list[str]:
    own = [" ".join((item.caption or "").split()) if captions == "auto" else "" for item in items]
    missing = [item.name for item, text in zip(items, own, strict=True) if not text]
    if any(own) and missing:
        raise ValueError(
            f"{source}: {len(missing)} of {len(items)} images have no caption while the others have one: "
            f"{', '.join(missing)}. Give every image a .txt file or a metadata.jsonl line, or set captions='template'."
        )
    return [_fill(text or template, identifier, class_noun, item.name) for item, text in zip(items, own, strict=True)]


def _fill(caption: str, identifier: str, class_noun: str, where: str) -> str:
    """Replaces {identifier} and {class_noun}; anything else in braces is an error."""
    values = dict(zip(CAPTION_FIELDS, (identifier, class_noun), strict=True))
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(caption) if field is not None}
    except ValueError as error:
        raise ValueError(
            f"{where}: {caption!r} is not a valid caption: {error}. Write {{{{ and }}}} for literal braces."
        ) from error
    if unknown := sorted(fields - set(values)):
        raise ValueError(
            f"{where}: unknown field {{{unknown[0]}}} in {caption!r}; the fields are {{identifier}} and {{class_noun}}"
        )
    if empty := sorted(field for field in fields if not values[field]):
        raise ValueError(f"{where}: {caption!r} uses {{{empty[0]}}}, which is empty: set {empty[0]} or leave it out")
    return caption.format(**values)


# --- pixels


def _read_squares(
    items: Sequence[_Item], resolution: int, crop: str, flip: bool, views: int, seed: int, source
) -> list[np.ndarray]:
    squares, bad, small = [], {}, []
    for item in items:
        try:
            image = decode_image(item.read())
        except Exception as error:  # whatever a decoder trips over belongs on the list
            bad[item.name] = _reason(error)
            continue
        if min(image.size) < resolution:
            small.append(f"{item.name} ({image.width} x {image.height})")
        squares += [_square(image, resolution, *view) for view in _draw_views(item.name, crop, flip, views, seed)]
    if bad:
        _raise_listing(f"{len(bad)} of {len(items)} images in {source} cannot be read", bad, "Replace or remove them.")
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
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):
        return image  # a damaged or mismatched profile: show the stored values, as every viewer does


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return f"{type(error).__name__}: {error}"


def _draw_views(name: str, crop: str, flip: bool, views: int, seed: int) -> list[tuple[float, bool]]:
    """Per view the crop's place along the long side, in [0, 1], and whether it is mirrored."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    first = rng.integers(2)
    places = rng.random(views) if crop == "random" else np.full(views, 0.5)
    return [(float(place), flip and (first + view) % 2 == 1) for view, place in enumerate(places)]


def _square(image: Image.Image, resolution: int, place: float, mirrored: bool) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) * place, (image.height - side) * place
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(ImageOps.mirror(square) if mirrored else square)
