"""Encoded class images are kept, found again by their pixels, and never believed when anything else has changed."""

import numpy as np
import pytest
from etils import epath

from dreambooth_jax.data.latents import Latents

ABOUT = {"base": "0123", "dtype": "float32"}
FILE = ".latents_6x4.safetensors"


class Encoder:
    """Halves pixels, and counts the pictures."""

    def __init__(self):
        self.count = 0

    def __call__(self, images):
        self.count += len(images)
        mean = images[:, ::2, ::2].astype(np.float32)
        return mean, mean / 10

    def new(self, latents, images):
        """How many of the images are encoded; their numbers are right in any case."""
        before = self.count
        mean, std = latents.of(images, self)
        np.testing.assert_array_equal(mean, images[:, ::2, ::2])
        np.testing.assert_array_equal(std, mean / 10)
        return self.count - before


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)


@pytest.fixture
def encoder():
    return Encoder()


def test_only_new_pictures_are_encoded(images, encoder, tmp_path):
    latents = Latents([epath.Path(tmp_path)], ABOUT)
    assert encoder.new(latents, images[:4]) == 4
    assert encoder.new(latents, images[:4]) == 0
    assert encoder.new(latents, images[[3, 4, 0, 1, 1]]) == 1
    assert encoder.new(latents, images[[4, 1]]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_another_base_or_dtype_is_encoded_for(images, encoder, tmp_path):
    folders = [epath.Path(tmp_path)]
    for about in (ABOUT, ABOUT | {"base": "4567"}, ABOUT | {"dtype": "bfloat16"}):
        assert encoder.new(Latents(folders, about), images) == 5
        assert encoder.new(Latents(folders, about), images) == 0


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "another file"])
def test_a_damaged_file_is_made_anew(images, encoder, tmp_path, damage):
    latents, path = Latents([epath.Path(tmp_path)], ABOUT), tmp_path / FILE
    encoder.new(latents, images)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"short": data[:-40], "flipped": data, "empty": b"", "another file": b"{}" * 99}[damage])
    assert encoder.new(latents, images) == 5
    assert encoder.new(latents, images) == 0


def test_where_the_first_folder_cannot_be_written_the_second_is(images, encoder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    latents = Latents([epath.Path(tmp_path / "file" / "folder"), epath.Path(tmp_path / "workdir")], ABOUT)
    assert encoder.new(latents, images) == 5 and (tmp_path / "workdir" / FILE).exists()
    assert encoder.new(latents, images) == 0


@pytest.mark.slow
def test_a_run_keeps_them_beside_its_class_images(finished):
    assert (finished / "class_images" / ".latents_16x16.safetensors").exists()
