# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Web servers on the loopback address: a folder of packages, and the parts of the Hugging Face Hub for a download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

HOST = "127.0.0.1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


class _Hub(BaseHTTPRequestHandler):
    """One repository with one tag; implements the endpoints that ``huggingface_hub.snapshot_download`` uses."""

    def __init__(self, repo: str, tag: str, folder: Path, *arguments: object) -> None:
        self.repo, self.tag, self.folder = repo, tag, folder
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        api, files = f"/api/models/{self.repo}", f"/{self.repo}/resolve/{COMMIT}/"
        if path == f"{api}/refs":
            tag = {"name": self.tag, "ref": f"refs/tags/{self.tag}", "targetCommit": COMMIT}
            self._json({"branches": [], "converts": [], "tags": [tag]})
        elif path == f"{api}/revision/{self.tag}":
            self._json({"id": self.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self._files()]})
        elif path == f"{api}/tree/{COMMIT}":
            self._json([{"type": "file", "path": name, **self._about(name)} for name in self._files()])
        elif path.startswith(files) and path.removeprefix(files) in self._files():
            name = path.removeprefix(files)
            self._answer((self.folder / name).read_bytes(), ETag=f'"{self._about(name)["oid"]}"')
        else:
            self.send_error(404)

    def _files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def _about(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        return {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    def _json(self, content: object) -> None:
        self._answer(json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _answer(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def _serve(handler: object) -> Iterator[str]:
    server = ThreadingHTTPServer((HOST, 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def serve_folder(folder: Path):
    """Serve the files of a folder; a context manager that returns the URL."""
    return _serve(partial(_Quiet, directory=str(folder)))


def serve_hub(folder: Path, *, repo: str, tag: str):
    """Serve a folder as a Hugging Face repository; a context manager that returns the URL for ``HF_ENDPOINT``."""
    return _serve(partial(_Hub, repo, tag, folder))
