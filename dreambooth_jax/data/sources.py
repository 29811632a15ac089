"""Sources of photos, with an account of every file in them.

    folder               JPEG, PNG and WebP files directly in it, or those that a metadata file names in subfolders
    folder of N_NAME/    the layout of kohya's scripts: N repeats of the images of every such subfolder
    hub:OWNER/NAME       a data set of the model hub, fetched and read like a folder
    tfds:NAME:SPLIT      a TFDS split stored as ArrayRecord

`list_source` names every unused file, with the reason.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from huggingface_hub import snapshot_download

from dreambooth_jax.data.captions import (
    CAPTION_SUFFIXES,
    METADATA,
    match_sidecars,
    raise_listing,
    read_metadata,
    read_text,
)
from dreambooth_jax.data.paths import printable, read_file

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".webp")
# Pictures that are not read. Skipping them like a README would drop a person's photos in silence.
RAW_SUFFIXES = (
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef"),
    *(".srw", ".x3f", ".3fr", ".iiq", ".rwl", ".raw"),
)
FOREIGN_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".psd", ".psb", ".xcf", ".kra"),
    *(".svg", ".eps", ".exr", ".hdr", ".tga", ".ico", ".ppm", ".pgm", ".dds", ".qoi", ".apng"),
    *RAW_SUFFIXES,
)
VIDEO_SUFFIXES = (".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".3gp")
MASK_ENDING = "-masklabel"  # OneTrainer's name of the mask of NAME.jpg: NAME-masklabel.png
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
_KOHYA = re.compile(r"(\d+)_(.+)")
_LONGEST_LIST = 20  # names per reason
_MOST_REPEATS = 1000  # of a picture in kohya's layout; larger numbers are dates


class Item(NamedTuple):
    """A picture of a source.

    Attributes:
        name: printable name, relative to the source.
        read: the encoded image.
        caption: its own caption, or None.
        mask: the encoded mask, or None.
    """

    name: str
    read: Callable[[], bytes]
    caption: str | None = None
    mask: Callable[[], bytes] | None = None


class Listing(NamedTuple):
    """The contents of a source.

    Attributes:
        items: used pictures.
        unused: printable name of a file -> reason.
        remarks: further lines for the plan.
    """

    items: tuple[Item, ...]
    unused: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def list_source(source: str | os.PathLike, captions: str = "auto") -> Listing:
    """Lists a folder, `hub:` data set or `tfds:` split.

    Args:
        source: see the module; a folder may begin with `~`.
        captions: "auto", or "template" to leave captions unread.

    Raises:
        FileNotFoundError: the folder or the data set is not there.
        ValueError: no images, images in formats that are not read, or captions that contradict each other.
    """
    text = os.fspath(source)
    if text.startswith("tfds:"):
        return Listing(tuple(tfds_items(text)), {})
    return list_folder(hub_folder(text) if text.startswith("hub:") else text, captions)


def report(listing: Listing) -> list[str]:
    """Lines for the plan: remarks, then the unused files, grouped by reason."""
    groups = defaultdict(list)
    for name, reason in listing.unused.items():
        groups[reason].append(name)
    return [*listing.remarks, *(f"not used: {_few(names)}: {reason}" for reason, names in groups.items())]


def _few(names: Sequence[str]) -> str:
    more = len(names) - _LONGEST_LIST
    return ", ".join(names[:_LONGEST_LIST]) + (f" and {more} more" if more > 0 else "")


# --- folders


class _Files(NamedTuple):
    """The visible entries of one folder, sorted by name."""

    pictures: tuple[epath.Path, ...]
    masks: Mapping[str, epath.Path]  # printable stem of the picture -> its mask
    captions: tuple[epath.Path, ...]
    metadata: tuple[epath.Path, ...]
    folders: tuple[epath.Path, ...]
    foreign: tuple[str, ...]  # printable names of pictures that are not read, without a readable one of that name
    unused: Mapping[str, str]


def list_images(folder: str | os.PathLike) -> list[epath.Path]:
    """The JPEG, PNG and WebP files directly in `folder`, sorted by name; none where the folder does not exist.

    Hidden files, masks and files that are no images are skipped.

    Raises:
        ValueError: the folder holds pictures of a kind that is not read (HEIC, TIFF, ...), or names that are printed
            alike; all of them are listed.
    """
    folder = epath.Path(os.path.expanduser(folder))
    return list(_sort_readable(folder).pictures) if folder.is_dir() else []


def list_folder(source: str | os.PathLike, captions: str = "auto") -> Listing:
    """Lists a folder; arguments and errors are `list_source`'s."""
    folder = epath.Path(os.path.expanduser(source))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No image folder {printable(str(folder))}. Give an existing folder with 3-5 JPEG, PNG or WebP photos, "
            "hub:OWNER/NAME or tfds:NAME:SPLIT."
        )
    files = _sort_readable(folder)
    listing = _list_flat(folder, files, captions)
    repeated = [sub for sub in files.folders if _KOHYA.fullmatch(sub.name) and _count_images(sub)]
    if not listing.items and repeated:
        _check_different(folder, repeated)
        listing = _list_repeated(repeated, listing, captions)
    if not listing.items:
        others = [name for name in listing.unused if name.endswith("/")]
        listing = listing._replace(unused={name: why for name, why in listing.unused.items() if name not in others})
        where = f" The subfolders {_few(others)} hold some: give one of them." if others else ""
        raise ValueError(
            f"{printable(str(folder))} holds no images. Put JPEG, PNG or WebP files directly in it (subfolders are not "
            f"searched).{where}{_hints(listing)}"
        )
    return listing


def _hints(listing: Listing) -> str:
    return "".join(f"\n  {line}" for line in report(listing))


def _sort_files(folder: epath.Path) -> _Files:
    kinds = defaultdict(list)
    unused, foreign = {}, []
    for path in sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name):
        name, suffix = path.name, path.suffix.lower()
        if path.is_dir():
            kinds["folders"].append(path)
        elif suffix in SUFFIXES:
            kinds["pictures"].append(path)
        elif name.lower() in METADATA:
            kinds["metadata"].append(path)
        elif suffix in CAPTION_SUFFIXES:
            kinds["captions"].append(path)
        elif suffix in FOREIGN_SUFFIXES:
            foreign.append(path)
        elif suffix in VIDEO_SUFFIXES:
            unused[printable(name)] = "a video"
        elif name.lower() not in _SYSTEM_FILES:
            unused[printable(name)] = _why_unused(path)
    _check_different(folder, kinds["pictures"])
    pictures = [path for path in kinds["pictures"] if not path.stem.endswith(MASK_ENDING)]
    stems = {printable(path.stem) for path in pictures}
    masks = _masks(folder, [path for path in kinds["pictures"] if path.stem.endswith(MASK_ENDING)])
    unused |= {
        printable(path.name): "a mask; no picture of that name" for stem, path in masks.items() if stem not in stems
    }
    for path in foreign:
        twin = "the JPEG, PNG or WebP of that name is read" if printable(path.stem) in stems else "not read"
        unused[printable(path.name)] = f"{path.suffix[1:].upper()}; {twin}"
    return _Files(
        tuple(pictures),
        masks,
        tuple(kinds["captions"]),
        tuple(kinds["metadata"]),
        tuple(kinds["folders"]),
        tuple(printable(path.name) for path in foreign if printable(path.stem) not in stems),
        unused,
    )


def _sort_readable(folder: epath.Path) -> _Files:
    """`_sort_files` of a folder without pictures that are not read; raises ValueError that lists them."""
    files = _sort_files(folder)
    if files.foreign:
        raise ValueError(
            f"{printable(str(folder))}: these pictures are not JPEG, PNG or WebP; convert or remove them: "
            f"{', '.join(files.foreign)}"
        )
    return files


def _grouped(paths: Iterable[epath.Path], key: Callable[[epath.Path], str]) -> dict[str, list[epath.Path]]:
    groups = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return groups


def _check_different(folder: epath.Path, paths: Sequence[epath.Path]) -> None:
    """Raises ValueError that lists different names, of which printing makes one: an e with its accent is one character
    or two."""
    groups = _grouped(paths, lambda path: printable(path.name))
    alike = {name: " and ".join(ascii(p.name) for p in same) for name, same in groups.items() if len(same) > 1}
    if alike:
        raise_listing(f"{printable(str(folder))}: names that look the same", alike, "Rename or remove all but one.")


def _masks(folder: epath.Path, paths: Sequence[epath.Path]) -> dict[str, epath.Path]:
    """Printable stem of a picture -> its mask. Raises ValueError that lists pictures with several."""
    groups = _grouped(paths, lambda path: printable(path.stem.removesuffix(MASK_ENDING)))
    several = {stem: ", ".join(printable(p.name) for p in found) for stem, found in groups.items() if len(found) > 1}
    if several:
        raise_listing(f"{printable(str(folder))}: pictures have masks twice", several, "Keep one mask for each.")
    return {stem: path for stem, (path,) in groups.items()}


def _why_unused(path: epath.Path) -> str:
    if path.suffix:
        return f"{path.suffix} files are not read"
    try:
        start = read_file(path)[:4]
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    known = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), None)
    return f"an image without a suffix; add {known} to its name" if known else "a file without a suffix"


def _count_images(folder: epath.Path, depth: int = 3) -> int:
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return 0
    direct = sum(path.suffix.lower() in SUFFIXES and not path.is_dir() for path in paths)
    return direct + sum(_count_images(path, depth - 1) for path in paths if depth > 1 and path.is_dir())


def _list_flat(
    folder: epath.Path, files: _Files, captions: str, *, prefix: str = "", default: str | None = None
) -> Listing:
    """The pictures directly in `folder`, and those in subfolders that a metadata file names.

    Args:
        prefix: put before every printable name.
        default: caption of pictures without their own.
    """
    paths = {printable(path.name): path for path in files.pictures}
    unused: dict[str, str] = {}
    texts: dict[str, str] = {}
    remarks: list[str] = []
    if captions == "template":
        unused |= {printable(p.name): "captions = 'template'" for p in (*files.metadata, *files.captions)}
    else:
        sidecars, strays = match_sidecars(paths, files.captions)
        _check_one_kind(folder, files.metadata, sidecars)
        for path in files.metadata:
            found = read_metadata(path, paths)
            texts |= found.texts
            paths |= found.inner
            remarks += found.remarks
        texts |= {name: read_text(path) for name, path in sidecars}
        unused |= strays
    within = _subfolders(folder, files, paths)
    masks = {f"{room}{stem}": mask for room, there in within.items() for stem, mask in there.masks.items()}
    items = [
        Item(
            prefix + name,
            lambda path=path: read_file(path),
            texts.get(name, default),
            (lambda path=mask: read_file(path)) if (mask := masks.get(_stem(name))) else None,
        )
        for name, path in sorted(paths.items())
    ]
    unused = _unsearched(within) | dict(files.unused) | unused | _unnamed(within, paths)
    return Listing(tuple(items), {prefix + name: reason for name, reason in unused.items()}, tuple(remarks))


def _check_one_kind(
    folder: epath.Path, metadata: Sequence[epath.Path], sidecars: Sequence[tuple[str, epath.Path]]
) -> None:
    """Raises ValueError that names the kinds of captions of a folder if they are several."""
    kinds = [path.name for path in metadata]
    kinds += ["caption files such as " + sidecars[0][1].name] if sidecars else []
    if len(kinds) > 1:
        raise ValueError(
            f"{printable(str(folder))} has captions twice, in {' and in '.join(kinds)}: remove one of them, or set "
            "captions='template'"
        )


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _subfolders(folder: epath.Path, files: _Files, paths: Mapping[str, epath.Path]) -> dict[str, _Files]:
    """The files of `folder`, and of its subfolders that hold used pictures: printable name with a slash -> files.

    Args:
        files: of `folder`, whose name is "".
        paths: printable name -> path of the used pictures.
    """
    within = {"": files}
    for name, path in paths.items():
        for above, place in zip(PurePosixPath(name).parents, path.parents, strict=False):
            if place == folder:
                break
            if f"{above}/" not in within:
                within[f"{above}/"] = _sort_files(place)
    return within


def _unsearched(within: Mapping[str, _Files]) -> dict[str, str]:
    """Name -> reason of the subfolders with images in which no picture is used."""
    names = {f"{room}{printable(sub.name)}/": sub for room, files in within.items() for sub in files.folders}
    counts = {name: _count_images(sub) for name, sub in names.items() if name not in within}
    return {name: f"a subfolder with {n} images; subfolders are not searched" for name, n in counts.items() if n}


def _unnamed(within: Mapping[str, _Files], used: Mapping[str, epath.Path]) -> dict[str, str]:
    """Name -> reason of the unused files in subfolders whose pictures a metadata file names.

    Args:
        used: printable name -> path of the used pictures.
    """
    unused: dict[str, str] = {}
    stems = {_stem(name) for name in used}
    for room, files in within.items():
        if room:
            masks = [path for stem, path in files.masks.items() if f"{room}{stem}" not in stems]
            others = [*files.pictures, *masks, *files.captions, *files.metadata]
            unused |= {f"{room}{printable(path.name)}": "the metadata file does not name it" for path in others}
            unused |= {f"{room}{name}": reason for name, reason in files.unused.items()}
    return {name: reason for name, reason in unused.items() if name not in used}


def _list_repeated(folders: Sequence[epath.Path], outer: Listing, captions: str) -> Listing:
    """kohya's layout. The repeats of several folders count by their proportion: steps are counted, not epochs.

    Raises:
        ValueError: numbers so different that they are dates, or see `list_source`.
    """
    names = [f"{printable(folder.name)}/" for folder in folders]
    items, remarks = [], list(outer.remarks)
    unused = {name: reason for name, reason in outer.unused.items() if name not in names}
    repeats = [int(_KOHYA.fullmatch(folder.name)[1]) for folder in folders]
    unused |= {name: "0 repeats" for name, number in zip(names, repeats, strict=True) if not number}
    common = math.gcd(*repeats) or 1
    if max(repeats) // common > _MOST_REPEATS:
        raise ValueError(
            f"{_few(names)}: the number before _ is that of an image's repeats in kohya's layout, and these differ by "
            f"more than {_MOST_REPEATS} to 1. Give small numbers, such as 1_rex and 2_rex, or put all images into one "
            "folder."
        )
    for folder, name, number in zip(folders, names, repeats, strict=True):
        default = _KOHYA.fullmatch(printable(folder.name))[2]
        listing = _list_flat(folder, _sort_readable(folder), captions, prefix=name, default=default)
        items += [item for item in listing.items for _ in range(number // common)]
        unused |= listing.unused
        remarks += [
            f"{name}: {len(listing.items)} images, {_times(number // common)}; caption of those without their own: "
            f"{default!r}",
            *listing.remarks,
        ]
    return Listing(tuple(items), unused, tuple(remarks))


def _times(number: int) -> str:
    return "each once" if number == 1 else f"each {number} times"


# --- data sets


def hub_folder(source: str) -> epath.Path:
    """Fetches `hub:OWNER/NAME[@REVISION][/FOLDER]`, a data set of image files on the model hub; returns its local copy.

    Raises:
        FileNotFoundError: the hub does not give it.
        ValueError: `source` is not of that form.
    """
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(/.*)?", source)
    if not match or ".." in source:
        raise ValueError(f"{source!r} is not of the form hub:OWNER/NAME[@REVISION][/FOLDER]")
    name, revision, inner = match.groups()
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
    except Exception as error:  # offline, unknown or gated: the hub client has a type for each
        raise FileNotFoundError(
            f"{source}: the model hub did not give the data set ({error}). Check the name and the network, or give a "
            "folder."
        ) from error
    return epath.Path(folder) / (inner or "").strip("/")


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


def _open_tfds(name: str, split: str, data_dir: str | None) -> tuple[Any, str, str | None]:
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
