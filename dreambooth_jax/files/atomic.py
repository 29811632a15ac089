"""Whole files or none: a killed process leaves the old file or the new one, never a part of it."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in str(path)


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replaces the content of a file, local or in a bucket; its folder is made if absent.

    The data are on the disk, not only in the system's cache, when this returns.

    Raises:
        OSError: the folder cannot be written.
    """
    if is_remote(path):
        epath.Path(path).write_bytes(data)  # object stores show an object when it is complete
        return
    with naming(path), replacing(path) as partial:
        partial.write_bytes(data)


def create(path: str | os.PathLike, data: bytes) -> None:
    """Makes an object of a bucket that is not there: of several processes one succeeds.

    Raises:
        FileExistsError: it is there.
    """
    system, name = fsspec.core.url_to_fs(os.fspath(path))
    system.pipe_file(name, data, mode="create")


def read_now(path: str | os.PathLike) -> bytes:
    """The content of a file at this moment: the libraries of buckets remember what others have replaced since.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    system, name = fsspec.core.url_to_fs(os.fspath(path))
    return system.cat_file(name)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in an OSError that does not say which it is about: a full disk's, when data are written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty new file beside `path` (local); the body writes it, then it takes the place of `path`.

    The partial file has a random name and is made by this process alone: a link that somebody else has put there is
    not followed. It is hidden, so that no listing of images or weights takes it for a whole file, and it is deleted
    if the body fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{secrets.token_hex(8)}.partial"
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner reads
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_partial(folder: str | os.PathLike) -> list[str]:
    """Deletes what killed processes have left of files in a local folder, not below it; nobody else may write there.

    Returns:
        The paths of these files.
    """
    if is_remote(folder) or not os.path.isdir(folder):
        return []
    found = [path for path in Path(folder).iterdir() if re.fullmatch(r"\.[0-9a-f]{16}\.partial", path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return sorted(map(str, found))


def sync(path: Path) -> None:
    """Waits until a local file, or the names in a local folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
