"""Captions: templates, and the captions that a folder holds."""

import json
import string
from collections.abc import Mapping, Sequence

from etils import epath

CAPTION_FIELDS = ("identifier", "class_noun")


def raise_listing(problem: str, reasons: Mapping[str, str], remedy: str) -> None:
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"{problem}:\n{lines}\n{remedy}")


def folder_captions(folder: epath.Path, paths: Sequence[epath.Path]) -> dict[str, str]:
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
        raise_listing(
            f"{path} has unusable lines", bad, 'Each line must be {"file_name": "dog.jpg", "text": "a caption"}.'
        )
    return texts


def fill(caption: str, identifier: str, class_noun: str, where: str) -> str:
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
