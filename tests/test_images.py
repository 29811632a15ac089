"""Real files of every awkward kind, written by Pillow and read back as training examples."""

import io
import json
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreambooth_jax.data.images import read_examples
from dreambooth_jax.data.sources import list_images

TEMPLATE = "a photo of {identifier} {class_noun}"


def read(source, resolution=32, **options):
    fields = {"template": TEMPLATE, "identifier": "sks", "class_noun": "dog"}
    return read_examples(source, resolution, **(fields | options))


def quadrants(width=64, height=64):
    """Red, green / blue, yellow: every orientation of it is a different picture."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 255, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 255
    pixels[height // 2 :, width // 2 :] = 255, 255, 0
    return pixels


def corners(image):
    h, w, _ = image.shape
    return image[[h // 4, h // 4, 3 * h // 4, 3 * h // 4], [w // 4, 3 * w // 4, w // 4, 3 * w // 4]].astype(int)


def only(folder, resolution=32, **options):
    examples = read(folder, resolution, **options)
    assert examples.images.shape == (1, resolution, resolution, 3) and examples.images.dtype == np.uint8
    return examples.images[0]


def noise(seed=0, height=40, width=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# What a camera that was held like this stores, for each value of the EXIF orientation tag.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_exif_orientation_is_undone(tmp_path, orientation, kind):
    stored = np.ascontiguousarray(STORED[orientation](quadrants(96, 64)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    np.testing.assert_allclose(corners(only(tmp_path)), corners(quadrants()), atol=12)


def test_transparency_lies_on_white(tmp_path):
    rgba = np.dstack([quadrants(), np.full((64, 64), 255, np.uint8)])
    rgba[:32, :32, 3] = 0
    rgba[32:, 32:, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_allclose(
        corners(only(tmp_path)), [[255, 255, 255], [0, 255, 0], [0, 0, 255], [255, 255, 127]], atol=1
    )


def test_palette_with_transparent_entry(tmp_path):
    image = Image.fromarray(quadrants()).quantize(4)
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(corners(only(tmp_path))[:2], [[255, 255, 255], [0, 255, 0]])


def test_grey_with_alpha_and_bilevel(tmp_path):
    la = np.stack([np.full((40, 40), 100, np.uint8), np.full((40, 40), 255, np.uint8)], -1)
    la[:20, :, 1] = 0
    Image.fromarray(la, "LA").save(tmp_path / "a.png")
    Image.new("1", (40, 40), 1).save(tmp_path / "b.png")
    Image.new("L", (40, 40), 77).save(tmp_path / "c.png")
    half, white, grey = read(tmp_path).images
    assert (half[:12] == 255).all() and (half[20:] == 100).all()
    assert (white == 255).all() and (grey == 77).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "I;16"
    row = only(tmp_path, 64)[5]
    assert (np.diff(row[:, 0].astype(int)) >= 3).all() and row[0, 0] == 0 and row[-1, 0] == 255
    assert (row == row[:, :1]).all()


def test_sixteen_bit_colour(tmp_path):
    rows = np.full((40, 40, 3), (65535, 32896, 0), ">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png_file([(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]))
    np.testing.assert_allclose(only(tmp_path)[0, 0].astype(int), [255, 128, 0], atol=1)


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(quadrants()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    np.testing.assert_allclose(corners(only(tmp_path)), corners(quadrants()), atol=16)


def test_the_embedded_colour_profile_counts(tmp_path):
    """A profile whose red primary is sRGB's blue and the reverse: stored red is seen as blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp!", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp!", b"bXYZ", 1)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png", icc_profile=swapped)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "b.png", icc_profile=srgb)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "c.png", icc_profile=b"damaged")
    pixels = read(tmp_path).images[:, 16, 16].astype(int)
    np.testing.assert_allclose(pixels, [[0, 0, 255], [255, 0, 0], [255, 0, 0]], atol=3)


def test_hidden_and_other_files_are_skipped_and_names_sorted(tmp_path):
    for name in ["b.JPG", "a.jpeg", "c.webp", ".hidden.png", "._a.jpeg"]:
        noise().save(tmp_path / name, format="PNG" if name[0] == "." else None)
    for name in [".DS_Store", "Thumbs.db", "LICENSE.txt", "desktop.ini", "notes.md"]:
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "sub.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.JPG", "c.webp"]
    assert read(tmp_path).names == ("a.jpeg", "b.JPG", "c.webp")


def test_pictures_of_other_kinds_are_not_dropped_in_silence(tmp_path):
    noise().save(tmp_path / "a.png")
    for name in ["IMG_1.HEIC", "scan.tif"]:
        (tmp_path / name).write_bytes(b"?")
    with pytest.raises(ValueError, match=r"IMG_1\.HEIC, scan\.tif"):
        read(tmp_path)


def png_file(chunks):
    parts = [
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb():
    """A few bytes that claim to be 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")])


def test_every_bad_file_is_listed_with_its_reason(tmp_path):
    noise().save(tmp_path / "good.png")
    for kind in ["jpg", "png", "webp"]:
        encoded = io.BytesIO()
        noise().save(encoded, {"jpg": "JPEG"}.get(kind, kind))
        (tmp_path / f"truncated.{kind}").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("<html>404</html>")
    noise().save(tmp_path / "renamed.jpg", "GIF")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    message = str(error.value)
    assert "8 of 9 images" in message and "good.png" not in message
    for name, reason in {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "truncated.webp": "",
        "bomb.png": "DecompressionBombError",
        "empty.jpg": "empty",
        "text.png": "not a JPEG, PNG or WebP",
        "renamed.jpg": "not a JPEG, PNG or WebP",
        "dangling.png": "No such file",
    }.items():
        assert any(name in line and reason in line for line in message.splitlines()), name


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No image folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        read(tmp_path)
    assert list_images(tmp_path / "nowhere") == []


# --- crops and flips


def test_center_crop_agrees_with_cropping_first(tmp_path):
    image = noise(height=64, width=96).resize((384, 256))
    image.save(tmp_path / "a.png")
    expected = image.crop((64, 0, 320, 256)).reduce(4)  # another filter: equal up to its ringing on smooth content
    assert np.abs(only(tmp_path, 64).astype(float) - np.asarray(expected)).mean() < 6


@pytest.mark.parametrize("size", [(33, 57), (57, 33), (7, 5), (1000, 9)])
def test_any_size_gives_squares(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    assert (only(tmp_path, 24) == (10, 200, 30)).all()


def test_random_crops_cover_the_long_side(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], (64, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    middles = read(tmp_path, 64, crop="random", views=50).images[:, 32, 32, 0]
    assert middles.min() < 50 and middles.max() > 205 and len(set(middles)) > 30


def test_flip_mirrors_half_of_the_views(tmp_path):
    Image.fromarray(quadrants()).save(tmp_path / "a.png")
    images = read(tmp_path, flip=True, views=4).images
    mirrored = [bool(image[8, 8, 1] > 128) for image in images]
    assert mirrored in ([False, True] * 2, [True, False] * 2)
    np.testing.assert_array_equal(images[0], images[1][:, ::-1])


def test_draws_depend_on_seed_and_name_only(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder, names in [(whole, "abcd"), (part, "c")]:
        folder.mkdir()
        for name in names:
            noise(ord(name), 40, 90).save(folder / f"{name}.png")
    options = {"crop": "random", "flip": True, "views": 3}
    all_four = read(whole, **options)
    assert all_four.names == tuple(f"{name}.png" for name in "abcd" for _ in range(3))
    assert len(all_four.captions) == 12
    np.testing.assert_array_equal(all_four.images[6:9], read(part, **options).images)
    np.testing.assert_array_equal(read(part, **options | {"views": 2}).images, all_four.images[6:8])
    assert (read(whole, **options, seed=1).images != all_four.images).any()


def test_bad_arguments(tmp_path):
    noise().save(tmp_path / "a.png")
    for options, message in [
        ({"crop": "middle"}, "crop must be"),
        ({"captions": "none"}, "captions must be"),
        ({"views": 3}, "same picture"),
        ({"views": 0}, "positive"),
        ({"resolution": 0}, "positive"),
        ({"template": "a photo of {subject}"}, r"unknown field \{subject\}"),
        ({"template": "a photo of {identifier"}, "not a valid caption"),
        ({"identifier": ""}, r"\{identifier\}, which is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(tmp_path, **options)


# --- captions


def test_template_captions(tmp_path):
    noise().save(tmp_path / "a.png")
    assert read(tmp_path).captions == ("a photo of sks dog",)
    assert read(tmp_path, template="a {class_noun}", identifier="").captions == ("a dog",)


def test_sidecar_captions(tmp_path):
    for name, caption in [("a", "{identifier} {class_noun}\nin snow\n"), ("b", "\ufeffein süßer Hund")]:
        noise().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("no caption {of} anything")
    assert read(tmp_path).captions == ("sks dog in snow", "ein süßer Hund")
    assert read(tmp_path, captions="template").captions == ("a photo of sks dog",) * 2


def test_metadata_captions(tmp_path):
    for name in ["a.png", "b.jpg"]:
        noise().save(tmp_path / name)
    lines = [{"file_name": "b.jpg", "text": "second {class_noun}", "more": 1}, {"file_name": "a.png", "text": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read(tmp_path).captions == ("first", "second dog")


def test_images_without_caption_are_listed(tmp_path):
    for name in "abcd":
        noise().save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("a dog")
    (tmp_path / "c.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"3 of 4 images have no caption.*a\.png, c\.png, d\.png"):
        read(tmp_path)


def test_bad_captions(tmp_path):
    noise().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a {colour} dog")
    with pytest.raises(ValueError, match=r"a\.png: unknown field \{colour\}"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        read(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="captions twice"):
        read(tmp_path)


def test_bad_metadata_lines_are_all_listed(tmp_path):
    noise().save(tmp_path / "a.png")
    lines = ["{broken", '{"file_name": "a.png"}', '{"file_name": "z.png", "text": "x"}', "[1]"]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "a.png", "text": "good"}']))
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert [f"line {i}" in str(error.value) for i in range(1, 6)] == [True] * 4 + [False]


# --- TFDS


def write_tfds(data_dir, encoded, texts, text_key="caption"):
    """A prepared TFDS data set `pets/small:1.0.0`, in TFDS's documented layout for data made elsewhere."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), text_key: tfds.features.Text()})
    folder = data_dir / "pets" / "small" / "1.0.0"
    folder.mkdir(parents=True)
    records = [features.serialize_example({"image": a, text_key: b}) for a, b in zip(encoded, texts, strict=True)]
    writer = ArrayRecordWriter(str(folder / "pets-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[len(records)], num_bytes=sum(map(len, records)))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_tfds_reads_like_a_folder(tmp_path, monkeypatch):
    """The same bytes give the same examples; orientation and transparency, which TFDS's decoder ignores, included."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = Image.fromarray(np.dstack([quadrants(), np.full((64, 64), 90, np.uint8)]))
    encoded = [encode(Image.fromarray(quadrants(96, 64)), exif=exif), encode(rgba, "PNG"), encode(noise(), "PNG")]
    texts = ["one {identifier}", "two", "three"]
    write_tfds(tmp_path, encoded, texts)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, data in enumerate(encoded):
        (folder / f"{i}.png").write_bytes(data)
    expected = read(folder)

    examples = read(f"tfds:pets/small:train?data_dir={tmp_path}")
    np.testing.assert_array_equal(examples.images, expected.images)
    assert examples.captions == ("one sks", "two", "three")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    sliced = read("tfds:pets/small:1.0.0:train[1:]", captions="template")
    np.testing.assert_array_equal(sliced.images, expected.images[1:])
    assert sliced.captions == ("a photo of sks dog",) * 2
    assert "tensorflow" not in sys.modules


def test_tfds_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_tfds(tmp_path, [encode(noise()), encode(noise())[:500], b"x"], ["a", "b", "c"], text_key="text")
    with pytest.raises(ValueError) as error:
        read("tfds:pets/small:train")
    assert "2 of 3" in str(error.value) and "train#1" in str(error.value) and "train#2" in str(error.value)
    for source, message in [
        ("tfds:pets", "not of the form"),
        ("tfds:pets/large:train", "tfds build pets/large --file_format=array_record"),
        ("tfds:pets/small:test", "Unknown split 'test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(source)


def test_images_that_are_enlarged_are_named(tmp_path, caplog):
    for name, height, width in (("small", 20, 40), ("fitting", 32, 32), ("large", 40, 33)):
        noise(height=height, width=width).save(tmp_path / f"{name}.png")
    read(tmp_path)
    assert "1 images are smaller than 32 pixels and were enlarged: small.png (40 x 20)" in caplog.text
