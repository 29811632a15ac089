"""Photos of subjects: a folder of them, or google/dreambooth's data set (NAME/*.jpg and prompts_and_classes.txt)."""

import os
import re
from typing import NamedTuple

import numpy as np
from etils import epath

from dreambooth_jax.data.captions import read_text
from dreambooth_jax.data.images import decode_image, reason, refuse_unreadable
from dreambooth_jax.data.sources import list_images, list_source
from dreambooth_jax.evaluation.transforms import Picture

CLASSES_FILE = "prompts_and_classes.txt"


class Subject(NamedTuple):
    """A subject of the data set: its name, its class noun and the folder of its photos."""

    name: str
    class_noun: str
    folder: epath.Path


def check_photos(source: str | os.PathLike) -> None:
    """Raises ValueError if a source has fewer than two photos, which scores need: DINO's bound is over pairs."""
    count = len({item.name for item in list_source(source, "template").items})
    if count < 2:
        raise ValueError(f"{source}: scores need two photos or more, found {count}")


def read_photos(source: str | os.PathLike) -> list[Picture]:
    """Every photo of a source of `data.sources` once, upright, uint8[h w 3], whole.

    Raises:
        FileNotFoundError, ValueError: see `list_source`; or photos cannot be read: all of them are listed.
    """
    items = {item.name: item for item in list_source(source, "template").items}  # kohya's folders repeat them
    photos, bad = [], {}
    for name, item in items.items():
        try:
            photos.append(np.asarray(decode_image(item.read())))
        except Exception as error:  # decoders' errors have no common type; the list takes all
            bad[name] = reason(error)
    refuse_unreadable(bad, len(items), source)
    return photos


def read_dataset(folder: str | os.PathLike) -> list[Subject]:
    """The subjects in google/dreambooth's layout, in the order of the classes file; folders that are absent are left
    out.

    Raises:
        FileNotFoundError: no classes file, or no subject's folder.
        ValueError: a folder of photos that the classes file does not name, or a classes file that is not UTF-8 text.
    """
    path = epath.Path(folder).expanduser()
    classes = path / CLASSES_FILE
    if not classes.exists():
        raise FileNotFoundError(f"{classes} is not there: give the folder `dataset` of google/dreambooth")
    pairs = re.findall(r"^(\w+),([a-z][a-z ]*)$", read_text(classes), re.MULTILINE)
    named = {name: noun for name, noun in pairs if (name, noun) != ("subject_name", "class")}
    there = sorted(child.name for child in path.iterdir() if child.is_dir() and list_images(child))
    unnamed = [name for name in there if name not in named]
    if unnamed:
        raise ValueError(f"{classes} has no class for {', '.join(unnamed)}: add a line NAME,CLASS for each")
    if not there:
        raise FileNotFoundError(f"{path} holds no folder of photos; expected one per subject of {classes}")
    return [Subject(name, noun, path / name) for name, noun in named.items() if name in there]
