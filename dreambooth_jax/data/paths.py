"""File names that can be printed and files that can be read, whatever a person has in a folder."""

import os
import stat
import unicodedata

from etils import epath


def printable(name: str) -> str:
    """A file name in NFC; bytes that are not UTF-8 as escapes."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


def find(folder: epath.Path, name: str) -> epath.Path | None:
    """The file in `folder` whose relative printable name is `name`, or None."""
    if (folder / name).is_file():
        return folder / name
    place = folder
    for part in name.split("/"):
        inside = place.iterdir() if place.is_dir() else ()
        place = next((path for path in inside if printable(path.name) == part), None)
        if place is None:
            return None
    return place if place.is_file() else None


def read_file(path: epath.Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: a pipe, socket or device, which could block for ever.
        OSError: the file cannot be read.
    """
    if "://" not in os.fspath(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file but a pipe, a socket or a device")
    return path.read_bytes()
