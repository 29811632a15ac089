"""Folders of random files: examples, or one error that names something; nothing in the folder changes."""

import io
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth_jax.data.images import read_examples
from dreambooth_jax.data.sources import list_source, report


def _encoded(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 20), 60).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [_encoded("JPEG"), _encoded("PNG", "RGBA"), _encoded("WEBP"), _encoded("GIF"), _encoded("PNG")[:90]]
METADATA = [
    b'{"file_name": "0.jpg", "text": "a"}\n',
    b'{"file_name": "../0.jpg", "caption": 3}',
    b"file_name,text\n0.jpg,a\n",
    b'{"0.jpg": {"caption": "a"}}',
    b"[1, null]",
    b"null",
    b'{"0.jpg": ["a"]}',
    b'"a"',
    b"file_name\n\n\n,,,\n",
    b'[{"file_name": null, "text": "a"}]',
    b'{"file_name": "1_a/0.png", "text": "{}"}',
    b"\xef\xbb\xbf",
    b"{" * 2000,
]
NAMES = [
    "0.jpg",
    "0.png",
    "0-masklabel.png",
    "a.JPG",
    "a.TXT",
    "0.txt",
    "0.jpg.txt",
    "0.caption",
    "metadata.jsonl",
    "metadata.csv",
    "metadata.json",
    "Metadata.CSV",
    ".hidden.png",
    "x.heic",
    "0.ARW",
    "v.mov",
    "n",
    "1_a/0.png",
    "2_b/0.jpg",
    "1_a/0.txt",
    "0_c/0.jpg",
    "d/e/0.png",
    "é.jpg",
    "e\u0301.txt",
    "\udcff.png",
    "\udcff.txt",
    "_.txt",
]
CONTENTS = st.one_of(
    st.sampled_from(IMAGES), st.sampled_from(METADATA), st.binary(max_size=60), st.text(max_size=30).map(str.encode)
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {os.fspath(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    files=st.dictionaries(st.sampled_from(NAMES), CONTENTS, max_size=8),
    captions=st.sampled_from(["auto", "template"]),
    masked=st.booleans(),
)
def test_examples_or_one_error_that_names_something(files, captions, masked):
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            path = Path(place) / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(data)
        before = snapshot(Path(place))
        try:
            examples = read_examples(
                place, 16, template="a {identifier}", identifier="sks", class_noun="", captions=captions, masked=masked
            )
            listing = list_source(place, captions)
            assert len(examples.images) == len(examples.captions) == len(listing.items) > 0
            assert "\n".join([*report(listing), *examples.names]).encode()
            used = {item.name for item in listing.items}
            assert not used & listing.unused.keys()
        except (ValueError, OSError) as error:
            assert str(error).encode()
        assert snapshot(Path(place)) == before
