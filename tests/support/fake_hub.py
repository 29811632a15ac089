"""A model hub on localhost that takes uploads: repository -> {path: bytes}."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """(address, what was uploaded to it)."""
    uploaded: dict[str, dict[str, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self, body, code=200):
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[1:] == ["repos", "create"]:
                about = json.loads(data)
                name = "/".join(filter(None, (about.get("organization"), about["name"])))
                uploaded.setdefault(name, {})
                return self.answer({"url": f"{address}/{name}"})
            if parts[1] == "validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            name = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = json.loads(data)["files"]
                modes = [{"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in files]
                return self.answer({"files": modes})
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    uploaded[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": f"{address}/{name}/commit/a"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, uploaded
    finally:
        server.shutdown()
