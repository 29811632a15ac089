"""Where photos come from: a folder, or a TFDS split."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from dreambooth_jax.data.captions import folder_captions

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Pictures that are not read. Skipping them like a README would drop a person's photos in silence.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".dng", ".cr2", ".nef")


class Item(NamedTuple):
    name: str
    read: Callable[[], bytes]  # the encoded image
    caption: str | None


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


def folder_items(source: str | os.PathLike) -> list[Item]:
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
    texts = folder_captions(folder, paths)
    return [Item(path.name, path.read_bytes, texts.get(path.name)) for path in paths]


def tfds_items(source: str) -> list[Item]:
    match = re.fullmatch(r"tfds:([^:?]+(?::\d[^:?]*)?):([^?]+)(?:\?data_dir=(.+))?", source)
    if not match:
        raise ValueError(f"{source!r} is not of the form tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]")
    name, split, data_dir = match.groups()
    records, image_key, caption_key = _open_tfds(name, split, data_dir or os.environ.get("TFDS_DATA_DIR"))
    items = []
    for i in range(len(records)):
        record = records[i]
        caption = record[caption_key].decode() if caption_key else None
        items.append(Item(f"{name}:{split}#{i}", lambda data=record[image_key]: data, caption))
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
