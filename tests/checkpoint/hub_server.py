"""A hub server on loopback: the requests of huggingface_hub that list and download a model.

It records requests, supports Range, can drop a connection once in the middle of a file, and can serve a gated
repository.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

SHA = "5" * 40


class Hub(ThreadingHTTPServer):
    """Serves `repos` (id -> folder); `asked` logs each request as (method, path, Range header)."""

    daemon_threads = True

    def __init__(self, repos: dict[str, pathlib.Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.asked: list[tuple[str, str, str | None]] = []
        self.gated: dict[str, str] = {}  # id -> the token that opens it
        self.cut_after: dict[str, int] = {}  # file -> bytes after which its connection is cut, once

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """The requested files, sorted, without duplicates."""
        return sorted(
            {path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET" and "resolve" in path}
        )


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) == 5 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), parts[4], body)
        else:
            self.fail(404, "EntryNotFound")

    def api(self, repo: str, rest: list[str], body: bool) -> None:
        if repo not in self.server.repos:
            self.fail(401, "RepoNotFound")
            return
        if len(rest) == 2 and rest[1] not in ("main", SHA):
            self.fail(404, "RevisionNotFound")
            return
        files = sorted(p for p in self.server.repos[repo].iterdir() if p.is_file())
        if rest and rest[0] == "tree":
            data: Any = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)} for p in files
            ]
        else:
            siblings = [{"rfilename": p.name} for p in files]
            data = {"id": repo, "modelId": repo, "sha": SHA, "private": False, "tags": [], "siblings": siblings}
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)

    def file(self, repo: str, name: str, body: bool) -> None:
        token = self.server.gated.get(repo)
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self.fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        path = self.server.repos[repo] / name
        if not path.is_file():
            self.fail(404, "EntryNotFound")
            return
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            content, status = content[begin:], 206
        self.send(status, content, headers, body, self.server.cut_after.pop(name, None) if body else None)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def fail(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, False)


def _etag(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(repos: dict[str, pathlib.Path]) -> Iterator[Hub]:
    """Run a hub server for the duration of the block."""
    hub = Hub(repos)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
