"""Every file that a person hands over is used, or named with the reason why it is not."""

import json
import os
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dreambooth_jax.data.images import read_examples
from dreambooth_jax.data.sources import list_source, report

PHOTO = Image.effect_noise((40, 40), 60).convert("RGB")


def photos(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(path, "JPEG")
    return folder


def captions_of(source, **options):
    fields = {"template": "a {identifier} {class_noun}", "identifier": "sks", "class_noun": "dog"} | options
    examples = read_examples(source, 32, **fields)
    return dict(zip(examples.names, examples.captions, strict=True))


@pytest.mark.parametrize("name", ["0.txt", "0.caption", "0.TXT", "0.Caption", "0.jpg.txt", "0.jpg.caption"])
def test_a_caption_file_for_each_picture(tmp_path, name):
    photos(tmp_path, "0.jpg")
    (tmp_path / name).write_text("sks dog zero\n")
    assert captions_of(tmp_path) == {"0.jpg": "sks dog zero"}
    assert list_source(tmp_path, "template").unused == {name: "captions = 'template'"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "0.jpg", "prompt": "zero"}\n{"file_name": "1.jpg", "prompt": "one"}\n'),
        ("metadata.jsonl", '{"file_name": "1.jpg", "text": "one"}\n\n{"file_name": "0.jpg", "text": "zero"}\n'),
        ("metadata.csv", "file_name,text\n0.jpg,zero\n1.jpg,one\n"),
        ("metadata.csv", "\ufefffile_name,n,caption\r\n0.jpg,3,zero\r\n1.jpg,4,one\r\n"),
        ("metadata.csv", 'file_name,text\r0.jpg,"zero",,\r1.jpg,one\r'),
        ("metadata.json", '{"0.jpg": {"caption": "zero"}, "1.jpg": {"caption": "one"}}'),
        ("metadata.json", '{"/home/me/train/0": {"tags": "zero"}, "/home/me/train/1": {"tags": "one"}}'),
        ("metadata.json", '[{"file_name": "0.jpg", "text": "zero"}, {"file_name": "1.jpg", "text": "one"}]'),
        ("metadata.json", '{"0.jpg": "zero", "1.jpg": "one"}'),
    ],
)
def test_one_file_of_captions_for_all(tmp_path, name, text):
    photos(tmp_path, "0.jpg", "1.jpg")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert captions_of(tmp_path) == {"0.jpg": "zero", "1.jpg": "one"}
    assert any(name in line for line in report(list_source(tmp_path)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,text\n0.jpg,zero\n9.jpg,nine\n", r"line 3: there is no image '9\.jpg'"),
        ("metadata.csv", "file_name,text\n0.jpg,zero\n0.jpg,other\n", r"line 3: another caption of 0\.jpg"),
        ("metadata.csv", "file_name,label\n\n0.jpg,dog,5\n", r"metadata\.csv, line 3: more cells than the columns"),
        ("metadata.csv", "file_name,text\n0.jpg,a dog, sitting\n", r"line 2: more cells .* double quotes"),
        ("metadata.csv", f"file_name,text\n0.jpg,{'a' * 200_000}\n", r"metadata\.csv, line 2: not readable as CSV"),
        ("metadata.json", "{broken", r"metadata\.json is not JSON"),
        ("metadata.jsonl", '{"file_name": "../0.jpg", "text": "x"}', r"no image '\.\./0\.jpg'"),
        ("metadata.jsonl", '{"text": "x"}', "no 'file_name'"),
        ("metadata.jsonl", "7", "7 is not an object"),
        ("metadata.jsonl", '{"file_name": "0.jpg"}\n7', "text is None, not a string"),
        ("metadata.json", "3", "3 is not an object"),
        ("metadata.json", "[" * 100_000, r"metadata\.json is not JSON: nested too deeply"),
        ("metadata.jsonl", "[" * 100_000, "line 1: nested too deeply"),
        ("metadata.jsonl", r'{"file_name": "0.jpg", "text": "a \ud83d dog"}', "line 1: text is .* half a character"),
    ],
)
def test_what_metadata_contradicts_is_named(tmp_path, name, text, message):
    photos(tmp_path, "0.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list_source(tmp_path)


def test_metadata_repeats_and_fields_that_hold_no_caption_are_named(tmp_path):
    photos(tmp_path, "0.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.jpg,zero\n0.jpg,zero\n")
    assert "metadata.csv, line 3: repeats 0.jpg" in report(list_source(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.jpg,7\n")
    (line,) = report(list_source(tmp_path))
    assert "metadata.csv is not used" in line and "label" in line
    assert captions_of(tmp_path) == {"0.jpg": "a sks dog"}


@pytest.mark.parametrize(
    "names", [("0.txt", "0.caption"), ("0.txt", "metadata.csv"), ("metadata.csv", "metadata.json")]
)
def test_two_captions_of_a_picture_are_an_error(tmp_path, names):
    photos(tmp_path, "0.jpg")
    for name in names:
        (tmp_path / name).write_text("file_name,text\n0.jpg,zero\n")
    with pytest.raises(ValueError, match="captions twice"):
        list_source(tmp_path)


def test_metadata_names_pictures_in_subfolders(tmp_path):
    photos(tmp_path, "train/a.jpg", "train/b.jpg", "spare/c.jpg")
    rows = [{"file_name": f"train/{name}.jpg", "text": f"sks {name}"} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions_of(tmp_path) == {"train/a.jpg": "sks a", "train/b.jpg": "sks b"}
    assert "1 images" in list_source(tmp_path).unused["spare/"]


def test_what_is_not_used_is_named_with_the_reason(tmp_path):
    photos(tmp_path, "0.jpg", "1.jpg", "more/deeper/2.jpg", "plain", "empty/x.md", "0-masklabel.png")
    for name in ["0.ARW", "1.MOV", "b.jpg.bak", "notes.md", "LICENSE.txt", "no_suffix", ".DS_Store", "Thumbs.db"]:
        (tmp_path / name).write_bytes(b"?")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    listing = list_source(tmp_path)
    assert [item.name for item in listing.items] == ["0.jpg", "1.jpg"]
    reasons = {
        "0.ARW": "ARW",
        "1.MOV": "video",
        "b.jpg.bak": ".bak",
        "notes.md": ".md",
        "LICENSE.txt": "no picture of that",
        "no_suffix": "without a suffix",
        "plain": "add .jpg",
        "pipe": "a pipe",
        "link": "No such file",
        "more/": "1 images",
    }
    assert listing.unused.keys() == reasons.keys()
    assert not [name for name, reason in reasons.items() if reason not in listing.unused[name]]
    assert all(any(name in line for line in report(listing)) for name in reasons)


@pytest.mark.parametrize("name", ["a.ARW", "a.psd", "a.svg", "a.avif", "a.HEIC", "a.cr3"])
def test_a_picture_of_another_kind_and_no_readable_one_beside_it_is_an_error(tmp_path, name):
    photos(tmp_path, "0.jpg")
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(ValueError, match=rf"convert or remove them: {name}"):
        list_source(tmp_path)


@pytest.mark.parametrize("name", ["0.jpg", "0.txt", "metadata.csv"])
def test_a_pipe_is_named_and_not_waited_for(tmp_path, name):
    photos(tmp_path, "1.jpg", *(["0.jpg"] if name == "0.txt" else []))
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"(?s){name}.*not a regular file"):
        captions_of(tmp_path)


def test_names_that_are_not_utf8_are_printed_with_escapes(tmp_path):
    PHOTO.save(tmp_path / "0.jpg")
    os.rename(tmp_path / "0.jpg", os.fsencode(tmp_path) + b"/rex\xff.jpg")
    os.symlink("nowhere", os.fsencode(tmp_path) + b"/\xfe.md")
    listing = list_source(tmp_path)
    assert captions_of(tmp_path) == {r"rex\udcff.jpg": "a sks dog"}
    assert "\n".join(report(listing)).encode()


@pytest.mark.parametrize(("picture", "caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(tmp_path, picture, caption):
    name = "chien-été"
    photos(tmp_path, unicodedata.normalize(picture, name) + ".jpg")
    (tmp_path / (unicodedata.normalize(caption, name) + ".txt")).write_text("sks dog")
    assert captions_of(tmp_path) == {f"{name}.jpg": "sks dog"}
    (tmp_path / (unicodedata.normalize(caption, name) + ".txt")).unlink()
    row = {"file_name": unicodedata.normalize(caption, name) + ".jpg", "text": "sks dog"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert captions_of(tmp_path) == {f"{name}.jpg": "sks dog"}


def test_names_that_look_the_same_are_named(tmp_path):
    """Two photos, of which one would vanish; the same in a folder that metadata names, and of kohya's folders."""
    names = [unicodedata.normalize(form, "été.jpg") for form in ("NFC", "NFD")]
    alike = rf"(?s)look the same.*{re.escape(ascii(names[0]))} and {re.escape(ascii(names[1]))}|look the same.*u0301"
    photos(tmp_path / "a", *names)
    photos(tmp_path / "b", *(f"train/{name}" for name in names))
    (tmp_path / "b" / "metadata.json").write_text(json.dumps({f"train/{names[0]}": "sks dog"}))
    photos(tmp_path / "c", *(f"10_{name}/0.jpg" for name in names))
    for folder in "abc":
        with pytest.raises(ValueError, match=alike):
            list_source(tmp_path / folder)


@pytest.mark.parametrize(("picture", "mask"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_masks_match_in_either_unicode_form_and_one_picture_has_one(tmp_path, picture, mask):
    photos(tmp_path, unicodedata.normalize(picture, "été") + ".jpg")
    photos(tmp_path, unicodedata.normalize(mask, "été") + "-masklabel.png")
    listing = list_source(tmp_path)
    assert listing.items[0].mask is not None and not listing.unused
    photos(tmp_path, unicodedata.normalize(mask, "été") + "-masklabel.jpg")
    with pytest.raises(ValueError, match=r"(?s)masks twice.*été"):
        list_source(tmp_path)


def test_in_a_subfolder_that_metadata_names_every_file_is_used_or_named(tmp_path):
    photos(tmp_path, "train/0.jpg", "train/1.jpg", "train/0-masklabel.png", "train/1-masklabel.png", "train/x/y/2.jpg")
    photos(tmp_path, "0-masklabel.png", "train/deep/3.jpg", "train/deep/4.jpg", "spare/5.jpg")
    for name in ("train/1.txt", "train/raw.heic", "train/deep/notes.md"):
        (tmp_path / name).write_bytes(b"?")
    rows = [{"file_name": f"train/{name}.jpg", "text": "sks dog"} for name in ("0", "./deep//3")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listing = list_source(tmp_path)
    assert {item.name: item.mask is not None for item in listing.items} == {
        "train/0.jpg": True,
        "train/deep/3.jpg": False,
    }
    assert listing.unused.keys() == {
        *("train/1.jpg", "train/1-masklabel.png", "train/1.txt", "train/raw.heic", "train/x/", "spare/"),
        *("train/deep/4.jpg", "train/deep/notes.md", "0-masklabel.png"),
    }
    (tmp_path / "train" / "0-masklabel.png").unlink()
    assert list_source(tmp_path).items[0].mask is None  # that of the folder above is another picture's


def test_dates_are_no_repeats(tmp_path):
    photos(tmp_path, "20240101_rex/0.jpg", "20240315_rex/1.jpg")
    with pytest.raises(ValueError, match=r"20240101_rex/, 20240315_rex/: .*such as 1_rex and 2_rex"):
        list_source(tmp_path)


def test_images_below_a_folder_of_kohya_are_named(tmp_path):
    photos(tmp_path, "10_sks/0.jpg", "10_sks/more/1.jpg")
    assert "1 images" in list_source(tmp_path).unused["10_sks/more/"]


def test_the_folders_of_kohya(tmp_path):
    photos(tmp_path, "10_sks dog/0.jpg", "10_sks dog/1.jpg", "20_sks dog_snow/2.jpg", "0_off/3.jpg", "log/4.jpg")
    (tmp_path / "10_sks dog" / "1.caption").write_text("sks dog sitting")
    with pytest.raises(ValueError, match=r"1 of .* no caption"):
        captions_of(tmp_path / "10_sks dog")
    (tmp_path / "10_sks dog" / "0.caption").write_text("sks dog lying")
    listing = list_source(tmp_path)
    assert Counter(item.name for item in listing.items) == {
        "10_sks dog/0.jpg": 1,
        "10_sks dog/1.jpg": 1,
        "20_sks dog_snow/2.jpg": 2,
    }
    assert captions_of(tmp_path) == {
        "10_sks dog/0.jpg": "sks dog lying",
        "10_sks dog/1.jpg": "sks dog sitting",
        "20_sks dog_snow/2.jpg": "sks dog_snow",
    }
    assert set(captions_of(tmp_path, captions="template").values()) == {"a sks dog"}
    assert listing.unused["0_off/"] == "0 repeats" and "1 images" in listing.unused["log/"]
    assert any("20_sks dog_snow/: 1 images, each 2 times" in line for line in report(listing))


def test_files_that_hold_less_than_their_number_says_are_named(tmp_path):
    """One file under two names, an animation, masks that nobody reads, a mask without a picture."""
    for name, colour in (("a.png", 1), ("copy of a.png", 1), ("b.png", 2)):
        Image.fromarray(np.arange(3 * 16 * 16, dtype=np.uint8).reshape(16, 16, 3) // colour).save(tmp_path / name)
    still, moved = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    moved.save(tmp_path / "c.webp", save_all=True, append_images=[still], duration=100)
    moved.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[still])
    mask = Image.linear_gradient("L").resize((16, 16))
    for name in ("b", "gone"):
        mask.save(tmp_path / f"{name}-masklabel.png")
    options = {"template": "a sks dog", "identifier": "sks", "class_noun": "dog"}
    examples = read_examples(tmp_path, 16, **options)
    assert examples.names == ("a.png", "b.png", "c.webp", "copy of a.png", "phone.jpg")
    assert examples.notes == (
        "not used: gone-masklabel.png: a mask; no picture of that name",
        "animations, of which the first picture is used: c.webp",
        "one file under 2 names: a.png, copy of a.png",
        "not used: masks of b.png: only masked_loss reads the masks of photos",
    )
    assert not [note for note in read_examples(tmp_path, 16, **options, masked=True).notes if "masked_loss" in note]


def test_an_empty_folder_says_where_images_are(tmp_path):
    photos(tmp_path, "raw/0.jpg")
    (tmp_path / "a.mov").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"(?s)holds no images.*raw/ hold some.*a\.mov: a video"):
        list_source(tmp_path)


def test_a_home_folder_expands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(photos(tmp_path, "rex/0.jpg")))
    assert [item.name for item in list_source("~/rex").items] == ["0.jpg"]
