"""PNGs are whole or absent and carry their story; sheets show every picture unchanged."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_jax.data.sources import list_images
from dreambooth_jax.painting.painter import batch_for
from dreambooth_jax.painting.sheets import contact_sheet, file_names, save_png


def flat(value, size=32):
    return np.full((size, size, 3), value, np.uint8)


def test_png_keeps_pixels_and_metadata(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    metadata = {"prompt": "ein süßer Hund, 狗 🐶", "seed": "7"}
    save_png(tmp_path / "new" / "a.png", image, metadata)
    with Image.open(tmp_path / "new" / "a.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), image)
        assert saved.text == metadata


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", flat(1), {})
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_png(tmp_path / "a.png", flat(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_what_a_kill_leaves_is_no_image(tmp_path, monkeypatch):
    """Between the write and the rename only a hidden file exists."""
    seen = []
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: seen.append([p.name for p in tmp_path.iterdir()]))
    monkeypatch.setattr("os.replace", lambda *_: seen.append([p.name for p in tmp_path.iterdir()]))
    save_png(tmp_path / "a.png", flat(1), {})
    assert len(seen) == 1 and len(seen[0]) == 1 and list_images(tmp_path) == []


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_save_png_takes_only_uint8_rgb(tmp_path, image):
    with pytest.raises(ValueError, match=r"a\.png: an image must be uint8\[h w 3\]"):
        save_png(tmp_path / "a.png", image, {})
    assert not list(tmp_path.iterdir())


def count(sheet, value):
    return int((sheet == value).all(-1).sum())


def test_contact_sheet_holds_every_picture_whole():
    values = [[50, 60, 70], [80, 90]]  # rows of different length
    sheet = contact_sheet([[flat(v) for v in row] for row in values], ["first", "second"], ["1", "2", "3"])
    assert sheet.dtype == np.uint8 and sheet.shape[-1] == 3
    places = {}
    for value in [v for row in values for v in row]:
        rows, cols = np.nonzero(
            (sheet == value).all(-1) & (np.abs(np.roll(sheet, 1, 0).astype(int) - value).sum(-1) == 0)
        )
        assert count(sheet, value) >= 32 * 32 and len(rows)
        places[value] = (np.median(rows), np.median(cols))
    assert places[50][1] < places[60][1] < places[70][1] and places[50][0] < places[80][0]
    assert places[50][1] == places[80][1]


def test_labels_are_drawn_and_long_ones_wrap():
    rows = [[flat(255), flat(255)]]
    blank, short, long = (contact_sheet(rows, [text]) for text in ("", "a dog", "a photo of a dog on the moon " * 3))
    assert (blank == 255).all()
    assert (short < 128).any() and short.shape == blank.shape
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1]


@pytest.mark.parametrize(
    ("rows", "labels", "columns"),
    [([], [], []), ([[flat(0)]], [], []), ([[flat(0), flat(0, 16)]], ["a"], []), ([[flat(0)]], ["a"], ["x", "y"])],
)
def test_contact_sheet_errors(rows, labels, columns):
    with pytest.raises(ValueError, match="contact sheet takes images of one size"):
        contact_sheet(rows, labels, columns)


def test_prompts_that_differ_in_punctuation_have_files_of_their_own():
    names = file_names(["a dog", "a dog!", "a cat", "?"])
    assert len(set(names.values())) == 4
    assert names["a cat"] == "a_cat" and names["a dog"].startswith("a_dog_")


@pytest.mark.parametrize(
    "prompt", ["\u4e00\u53ea\u53ef\u7231\u7684\u5c0f\u72d7" * 12, "e\u0301" * 200, "\N{DOG FACE}" * 80, "...", ""]
)
def test_any_prompt_gives_a_name_that_file_systems_take(prompt, tmp_path):
    name = file_names([prompt])[prompt]
    assert name and len(name.encode()) <= 100
    save_png(tmp_path / f"{name}_0.png", flat(1), {})


def test_prompts_that_differ_give_names_that_differ():
    prompts = ["a dog", "a dog!", "A dog?", "a dog_1", "a dog 2", "caf\u00e9", "cafe\u0301", "a" * 300, "a" * 301]
    names = [unicodedata.normalize("NFC", name).casefold() for name in file_names(prompts).values()]
    assert len(set(names)) == len(prompts)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(1, 32), st.sampled_from([1, 2, 4, 8]))
def test_no_request_is_filled_up_by_more_than_a_quarter(counts, most, devices):
    batch = batch_for(counts, most, devices)
    assert 1 <= batch <= most
    share = min(most, devices)  # pictures of one round of all devices
    for count in counts:
        assert -(-count // batch) * batch <= 1.25 * (-(-count // share) * share)


def test_pictures_at_once_of_the_configs():
    """Class images, sheets and the base's pictures of the embedded job and of Stable Diffusion's."""
    assert batch_for((100, 36, 6), 20) == 6 and batch_for((200, 12, 2), 8) == 2
    assert batch_for((200, 12, 2), 8, devices=8) == 8
