"""Captions: templates, and the captions that a folder holds.

0.txt, 0.caption, 0.jpg.txt     one file for each picture; suffixes in any case
metadata.jsonl, .csv, .json     one file for all: the layouts of Hugging Face's imagefolder and of kohya's scripts
"""

import string
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dreambooth_jax.data.paths import find, printable, read_file
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.tables import read_table

CAPTION_FIELDS = ("identifier", "class_noun")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
TEXT_COLUMNS = ("text", "caption", "prompt", "tags")  # the first of them that a file has
NAME_COLUMNS = ("file_name", "filename", "file", "image")


def fill(caption: str, identifier: str, class_noun: str, where: str) -> str:
    """Replaces {identifier} and {class_noun} in a caption.

    Args:
        where: name of the caption in errors.

    Raises:
        ValueError: other braces than these fields, or a field whose value is empty.
    """
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
            ". Write {{ and }} for literal braces, or set captions='template'."
        )
    if empty := sorted(field for field in fields if not values[field]):
        raise ValueError(f"{where}: {caption!r} uses {{{empty[0]}}}, which is empty: set {empty[0]} or leave it out")
    return caption.format(**values)


def is_text(value: str) -> bool:
    """Whether a string can be written to files: no null characters, no bytes that are not UTF-8 (as surrogates)."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def shuffled_tags(caption: str, count: int, seed: int) -> list[str]:
    """`count` orders of a caption's tags, which commas separate; the first tag keeps its place.

    The draws depend only on (seed, caption).
    """
    first, *others = [tag.strip() for tag in caption.split(",")]
    rng = np.random.default_rng([seed, zlib.crc32(caption.encode())])
    return [", ".join([first, *(others[i] for i in rng.permutation(len(others)))]) for _ in range(count)]


def raise_listing(problem: str, reasons: Mapping[str, str], remedy: str) -> None:
    """Raises ValueError with one line per name and reason."""
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"{problem}:\n{lines}\n{remedy}")


# --- one file per picture


def match_sidecars(
    pictures: Iterable[str], files: Sequence[epath.Path]
) -> tuple[list[tuple[str, epath.Path]], dict[str, str]]:
    """Caption files and their pictures, by the stem or the whole name, in NFC.

    Args:
        pictures: printable file names.
        files: caption files.

    Returns:
        (picture, caption file) pairs, and file name -> reason of those without a picture.

    Raises:
        ValueError: a picture with several caption files; all are named.
    """
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        by_stem.setdefault(name, []).append(name)
        by_stem.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, list[epath.Path]] = {}
    strays = {}
    for path in files:
        names = by_stem.get(printable(path.stem), [])
        for name in names:
            found.setdefault(name, []).append(path)
        if not names:
            strays[printable(path.name)] = "no picture of that name"
    several = {name: ", ".join(p.name for p in paths) for name, paths in found.items() if len(paths) > 1}
    if several:
        raise_listing(
            "pictures have captions twice", several, "Keep one caption file for each, or set captions='template'."
        )
    return [(name, path) for name, (path,) in found.items()], strays


def read_text(path: epath.Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        ValueError: other encodings, or a file that cannot be read.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(str(path))} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(str(path))} cannot be read: {error}") from error


# --- one file for all pictures


class Metadata(NamedTuple):
    """Contents of a metadata file.

    Attributes:
        texts: printable name of a picture, maybe in a subfolder -> its caption.
        inner: printable name -> path, of the pictures in subfolders.
        remarks: lines for the plan.
    """

    texts: dict[str, str]
    inner: dict[str, epath.Path]
    remarks: list[str]


def read_metadata(path: epath.Path, pictures: Mapping[str, epath.Path]) -> Metadata:
    """Reads metadata.jsonl, metadata.csv or metadata.json.

    Args:
        pictures: printable name -> path, of the pictures in the same folder.

    Raises:
        ValueError: lines that are broken, name absent pictures or contradict each other; all of them are listed.
    """
    rows, bad = _rows(path)
    column = next((c for c in TEXT_COLUMNS if any(c in row for row in rows.values())), None)
    if rows and column is None and not bad:
        found = ", ".join(sorted({name for row in rows.values() for name in row}))
        expected = ", ".join(TEXT_COLUMNS)
        return Metadata({}, {}, [f"{path.name} is not used: it holds no captions ({expected}), only {found}"])
    texts: dict[str, str] = {}
    inner: dict[str, epath.Path] = {}
    remarks = [f"captions: {column!r} of {path.name}"]
    for line, row in rows.items():
        try:
            name, place, text = _entry(row, column or TEXT_COLUMNS[0], path, pictures)
        except ValueError as error:
            bad[line] = str(error)
            continue
        if name in texts:
            if texts[name] != text:
                bad[line] = f"another caption of {name} than before"
            remarks.append(f"{path.name}, {line}: repeats {name}")
        texts[name] = text
        if name not in pictures:
            inner[name] = place
    if bad:
        example = '{"file_name": "dog.jpg", "text": "a caption"}'
        raise_listing(f"{path} has unusable lines", bad, f"Each line must be {example}, or its like in CSV or JSON.")
    return Metadata(texts, inner, remarks)


def _rows(path: epath.Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Rows by their place in the file, and place -> problem of those that cannot be parsed."""
    text, rows, bad = read_text(path), {}, {}
    if path.suffix.lower() == ".csv":
        rows = {f"line {number}": row for number, row in read_table(text, path).rows.items()}
    elif path.suffix.lower() == ".json":
        try:
            whole = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        rows = _json_rows(whole)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows[f"line {number}"] = parse_json(line)
                except ValueError as error:
                    bad[f"line {number}"] = str(error)
    bad |= {line: f"{row!r} is not an object" for line, row in rows.items() if not isinstance(row, Mapping)}
    return {line: row for line, row in rows.items() if line not in bad}, bad


def _json_rows(whole: Any) -> dict[str, Any]:
    """[{"file_name": ..., "text": ...}], {"0.jpg": {"caption": ...}} or {"0.jpg": "a caption"}."""
    if isinstance(whole, Mapping):
        by_name = {name: value if isinstance(value, Mapping) else {"text": value} for name, value in whole.items()}
        return {f"{name!r}": {NAME_COLUMNS[0]: name, **value} for name, value in by_name.items()}
    entries = whole if isinstance(whole, list) else [whole]
    return {f"entry {number}": entry for number, entry in enumerate(entries, 1)}


def _entry(
    row: Mapping[str, Any], column: str, path: epath.Path, pictures: Mapping[str, epath.Path]
) -> tuple[str, epath.Path, str]:
    """(picture, its path, caption) of a row. Raises ValueError if it names no picture or has no text."""
    given = next((row[c] for c in NAME_COLUMNS if c in row), None)
    if not isinstance(given, str):
        raise ValueError(f"no {NAME_COLUMNS[0]!r}")
    name = str(PurePosixPath(printable(given)))  # ./0.jpg is 0.jpg
    if name not in pictures and path.suffix.lower() == ".json":  # kohya's keys: whole paths, or without suffix
        last = PurePosixPath(name).name
        name = next((known for known in pictures if last in (known, known.rpartition(".")[0])), name)
    inside = "/" in name and not name.startswith("/") and ".." not in PurePosixPath(name).parts
    place = pictures.get(name) or (find(path.parent, name) if inside else None)
    if place is None:
        raise ValueError(f"there is no image {name!r} in this folder")
    if not isinstance(row.get(column), str):
        raise ValueError(f"{column} is {row.get(column)!r}, not a string")
    if not is_text(row[column]):
        raise ValueError(f"{column} is {row[column]!r}: half a character, or a null character")
    return name, place, row[column]
