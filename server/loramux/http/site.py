"""The page at ``/``: its few files, read once, with headers that let it load nothing else.

The files are open to everybody; whatever the page then shows it asks for with the reader's key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import Request
from starlette.responses import Response

from loramux.errors import NotFound

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Site:
    """The handlers. A request's path is looked up among the names read at the start, and never
    becomes a path of this machine."""

    def __init__(self) -> None:
        folder = Path(__file__).parent / "page"
        self._files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix])
            for path in folder.iterdir()
            if path.suffix in _TYPES
        }

    async def index(self, request: Request) -> Response:
        """The page itself."""
        return self._answer(request, _INDEX)

    async def file(self, request: Request, name: str) -> Response:
        """One of the files that belong to it. Raises NotFound."""
        if name not in self._files or name == _INDEX:
            raise NotFound("no such file of the page", code="route_not_found")
        return self._answer(request, name)

    def _answer(self, request: Request, name: str) -> Response:
        body, media_type = self._files[name]
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)
