"""Photos from a data set of a model hub, here on localhost."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
from PIL import Image

from dreambooth_jax.data import sources
from dreambooth_jax.data.sources import list_source

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that `snapshot_download` speaks, for `files`: path -> bytes of me/dogs."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **head):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **head}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/datasets/me/dogs"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            about = {"id": "me/dogs", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.answer(
                200, json.dumps(listing if "/tree/" in path else about).encode(), Content_Type="application/json"
            )
        elif path.startswith("/datasets/me/dogs/resolve/"):
            data = self.files[path.split("/", 6)[6]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that holds me/dogs; the library's downloads go to it."""
    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 40), 60).convert("RGB").save(photo)
    files = {"0.png": photo.read_bytes(), "snow/1.png": photo.read_bytes(), "README.md": b"dogs"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def download(name, **options):
        return huggingface_hub.snapshot_download(name, endpoint=endpoint, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(sources, "snapshot_download", download)
    yield server
    server.shutdown()


def test_a_data_set_of_the_hub_is_read_like_a_folder(hub):
    listing = list_source("hub:me/dogs")
    assert [item.name for item in listing.items] == ["0.png"]
    assert listing.items[0].read().startswith(b"\x89PNG")
    assert listing.unused == {"README.md": ".md files are not read", "snow/": listing.unused["snow/"]}
    assert [item.name for item in list_source(f"hub:me/dogs@{COMMIT}/snow").items] == ["1.png"]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("hub:me/cats", FileNotFoundError, "the model hub did not give the data set"),
        ("hub:dogs", ValueError, "not of the form hub:OWNER/NAME"),
        ("hub:me/dogs/../..", ValueError, "not of the form"),
        ("hub:me/dogs/rain", FileNotFoundError, "No image folder"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, source, kind, message):
    with pytest.raises(kind, match=message):
        list_source(source)
