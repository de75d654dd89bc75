"""A local server with the part of the Hugging Face Hub's interface that a download uses, which can misbehave on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".bin", ".safetensors", ".pth")  # kept in LFS, with a SHA-256


class HubStandIn(ThreadingHTTPServer):
    """Serves a folder as the repository `name`.

    Attributes:
        gone: files that are listed, but answer 404.
        cut: for each file, after how many bytes of an answer the connection closes, for as many answers.
        served: contents that differ from the listing.
        refused: status of every answer, unless 0.
        requests: path and Range header of every request for a file.
    """

    daemon_threads = True

    def __init__(self, folder: Path, name: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.name = folder, name
        self.gone: set[str] = set()
        self.cut: dict[str, list[int]] = {}
        self.served: dict[str, bytes] = {}
        self.refused = 0
        self.requests: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name in self.files():
            data = (self.folder / name).read_bytes()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if name.endswith(LARGE):
                entry["blobId"] = "0" * 40  # of the pointer
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.refused:
            self._answer(self.server.refused, b"")
        elif path == f"/api/models/{self.server.name}":
            self._answer(200, json.dumps(self.server.listing()).encode())
        elif path.startswith(start := f"/{self.server.name}/resolve/{COMMIT}/"):
            self._file(path.removeprefix(start))
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        self.server.requests.append((name, self.headers.get("Range")))
        if name in self.server.gone or name not in self.server.files():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.served.get(name, (self.server.folder / name).read_bytes())
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, headers = int(begin[1]) if begin else 0, {}
        if begin:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.server.cut.get(name)
        self._answer(206 if begin else 200, data[start:], headers, cuts.pop(0) if cuts else None)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub_stand_in(folder: Path, name: str) -> Iterator[HubStandIn]:
    """Run the server in a thread."""
    server = HubStandIn(folder, name)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
