"""A bucket in memory behind gs:// paths: objects alone, without folders, renames, appending, locks or times."""

from typing import ClassVar

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class Bucket(MemoryFileSystem):
    """What an object store can do, as Google's does it.

    Attributes:
        on_write: called before an object is written, to let something happen at that moment.
    """

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    on_write = staticmethod(lambda path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def makedirs(self, path, exist_ok=False):
        """There are no folders."""

    def mkdir(self, path, create_parents=True, **kw):
        """There are no folders."""

    def info(self, path, **kw):
        found = super().info(path, **kw)
        return {name: found[name] for name in ("name", "size", "type")}

    def _open(self, path, mode="rb", **kw):
        if mode not in ("rb", "wb", "xb"):
            raise NotImplementedError(f"objects cannot be opened in mode {mode!r}")
        if mode != "rb":
            type(self).on_write(path)
        return super()._open(path, mode, **kw)

    def pipe_file(self, path, value, mode="overwrite", **kw):
        type(self).on_write(path)
        super().pipe_file(path, value, mode=mode, **kw)

    def mv(self, *args, **kw):
        raise NotImplementedError("objects cannot be renamed")

    rename = move = cp_file = mv


def mount(monkeypatch) -> type[Bucket]:
    """Puts an empty bucket behind gs:// for one test."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.clear_instance_cache()
    return Bucket
