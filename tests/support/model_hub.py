"""A model hub on localhost: every folder under a root is the repository me/FOLDER."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


def make_handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"] and (root / parts[3]).is_dir():
                files = sorted(str(p.relative_to(root / parts[3])) for p in (root / parts[3]).rglob("*") if p.is_file())
                about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                if "tree" in parts:
                    sizes = {name: (root / parts[3] / name).stat().st_size for name in files}
                    about = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
                return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            path = root / parts[1] / "/".join(parts[4:]) if parts[2:3] == ["resolve"] else root / "absent"
            if not path.is_file():
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound" if parts[0] == "api" else "EntryNotFound")
            etag = f'"{hashlib.sha1(str(path).encode()).hexdigest()}"'
            return self.answer(200, path.read_bytes(), ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

        do_HEAD = do_GET

    return Handler


@contextlib.contextmanager
def serve(root: Path) -> Iterator[str]:
    """The address of a hub that gives the folders under `root`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
