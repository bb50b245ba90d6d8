"""Bodies that are still coming lie in memory unparsed: together they have a bound too.

Without it a thousand clients that send eight megabytes each and stop before the last byte would
take eight gigabytes, and admission would not have heard of one of them.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.config import ServerConfig
from loramux.errors import Overloaded

WHOLE_BODIES = 8
"""Unparsed bodies may be as many bytes as this many of the largest."""


def is_upload(scope: Scope) -> bool:
    """Whether the body is a file, or a form with files, that is written as it comes. All others
    are kept until they are whole."""
    path: str = scope["path"]
    if path == "/v1/adapters":
        return not any(
            name == b"content-type" and value.strip().lower().startswith(b"application/json")
            for name, value in scope["headers"]
        )
    part = scope["method"] == "PATCH" and path.startswith("/v1/uploads/")
    return part or path.startswith("/v1/blobs/")


class Bodies:
    """Pure ASGI: a body that is kept until it is whole may grow to twice of what is still free, so
    that large ones are refused with 503 and small ones pass. Uploads do not count.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self.limit = WHOLE_BODIES * config.max_body_bytes
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_upload(scope):
            await self.app(scope, receive, send)
            return
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                free = self.limit - self.held
                if size > free or held + size > 2 * free:
                    raise Overloaded("too many bytes of request bodies are on their way")
                held += size
                self.held += size
                if not message.get("more_body", False):  # parsed before anybody else has a turn
                    self.held -= held
                    held = 0
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.held -= held
