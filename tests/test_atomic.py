"""Files are replaced whole or not at all, and nobody can lead the writing elsewhere."""

import os
from pathlib import Path

import pytest

from dreambooth_jax.files.atomic import replacing, write_atomic


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.csv"
    write_atomic(path, b"old")
    with pytest.raises(OSError, match="No space"), replacing(path) as partial:
        partial.write_bytes(b"n")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"] and path.read_bytes() == b"newer"


def test_partial_files_are_hidden_new_and_of_names_that_differ(tmp_path):
    seen = []
    for _ in range(20):
        with replacing(tmp_path / "a.png") as partial:
            seen.append(partial.name)
            assert partial.parent == tmp_path and partial.stat().st_size == 0
    assert len(set(seen)) == 20 and all(name.startswith(".") and not name.endswith(".png") for name in seen)


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_bytes() == b"new"


def test_files_are_as_readable_as_any_other(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
        Path(tmp_path / "b").touch()
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_names_of_255_bytes_can_be_written(tmp_path):
    write_atomic(tmp_path / ("x" * 255), b"data")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"data"
