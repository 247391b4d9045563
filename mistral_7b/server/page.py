"""The chat page at "/": the files of server/web, read once at startup, so that no request opens a path.

Files are sent gzipped if the browser accepts that, with a hash as ETag. Browsers revalidate each file and get 304,
so that the page and its modules always have the same version.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from .state import State

WEB = Path(__file__).parent / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
# Same-origin resources only, nothing inline, and HTML from strings only through DOMPurify. The guard also sends a
# policy with every response; a browser enforces both.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {"cache-control": "no-cache", "content-security-policy": POLICY, "vary": "accept-encoding"}


@dataclass(frozen=True)
class File:
    """A file with its headers. `packed`: its gzipped bytes, or None if they are not smaller."""

    type: str
    plain: bytes
    packed: bytes | None
    tag: str

    @classmethod
    def read(cls, path: Path) -> File:
        plain = path.read_bytes()
        packed = gzip.compress(plain, mtime=0)
        tag = hashlib.sha256(plain).hexdigest()[:24]
        return cls(TYPES[path.suffix], plain, packed if len(packed) < 0.9 * len(plain) else None, tag)

    def response(self, request: Request) -> Response:
        pack = self.packed is not None and "gzip" in request.headers.get("accept-encoding", "")
        tag = f'"{self.tag}{"-gzip" if pack else ""}"'  # the bytes differ, so must the ETag
        headers = {**HEADERS, "etag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if not pack or self.packed is None:
            return Response(self.plain, media_type=self.type, headers=headers)
        return Response(self.packed, media_type=self.type, headers={**headers, "content-encoding": "gzip"})


def files() -> dict[str, File]:
    """All files by their path under /web/, without the licences of the libraries."""
    return {
        path.relative_to(WEB).as_posix(): File.read(path)
        for path in sorted(WEB.rglob("*"))
        if path.suffix in TYPES
    }


def router(state: State) -> APIRouter:
    """The routes GET / and GET /web/..."""
    known = files()
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return known["index.html"].response(request)

    @routes.api_route("/web/{name:path}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        if name not in known:
            raise HTTPException(404)  # the same response as for any unknown route
        return known[name].response(request)

    return routes
