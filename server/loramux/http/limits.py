"""What a body may be: how large, how slow, and, when it is JSON, how strict.

Starlette and the json module have no limits of their own: a 300 MB body is read whole, duplicate
keys silently pick the last, NaN and lone surrogates pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.config import ServerConfig
from loramux.errors import (
    InvalidRequest,
    LoramuxError,
    PayloadTooLarge,
    RequestError,
    UnsupportedMediaType,
)
from loramux.http.bodies import is_upload
from loramux.http.connection import STRIDE
from loramux.http.failures import failure

LINGER_S = 2.0
"""How long the rest of a refused body is read and dropped, so that the refusal arrives: closing a
socket with unread bytes resets it, and the client would see no answer."""

MULTIPART_OVERHEAD = 64 << 10
"""Room for boundaries, part headers and the name beside an upload's two files."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyTooSlow(RequestError):
    """The next ``STRIDE`` bytes of the body did not come within ``body_timeout_s``."""

    status = 408
    code = "request_timeout"
    retry = True


class Limits:
    """Pure ASGI: no body over its limit is read, and none is waited for for ever.

    ``refusal`` says who may not even try; it is asked before anything of the body is looked at.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, refusal: Callable[[Scope], LoramuxError | None]
    ) -> None:
        self.app = app
        self.refusal = refusal
        self.json_limit = config.max_body_bytes
        self.file_limit = config.max_adapter_file_bytes
        self.upload_limit = (
            config.max_adapter_file_bytes
            + config.max_heads_bytes
            + config.max_config_bytes
            + MULTIPART_OVERHEAD
        )
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.config)
        exchange.limit = self._limit(scope)
        try:
            refusal = self.refusal(scope)
            if refusal is None and exchange.declared > exchange.limit:
                refusal = exchange.too_large()
            if refusal is not None:
                await failure(refusal)(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            # A bug, logged and answered with a 500 where Starlette saw it; it raises it again, for
            # which uvicorn would drop a connection that the client thinks it may keep.
            if not exchange.complete:
                raise

    def _limit(self, scope: Scope) -> int:
        if not is_upload(scope):
            return self.json_limit
        return self.upload_limit if scope["path"] == "/v1/adapters" else self.file_limit


class _Exchange:
    """One request and its answer, with the bounds around ``receive`` and ``send``."""

    limit: int

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServerConfig) -> None:
        self._receive, self._send = receive, send
        self._body_timeout_s = self._patience_s = config.body_timeout_s
        self._stride = 0
        self._lingers = True
        self._received = 0
        self.complete = False
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        self.declared = int(length) if length.isdigit() else 0
        self._unread = self.declared > 0 or b"transfer-encoding" in headers

    def too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body exceeds {self.limit} bytes")

    async def receive(self) -> Message:
        message = await (self._body() if self._unread else self._receive())
        if message["type"] == "http.request":
            self._received += len(message["body"])
            self._unread = message.get("more_body", False)
            if self._received > self.limit:
                raise self.too_large()
        return message

    async def _body(self) -> Message:
        """The next piece. Only the waiting counts, not what the application does in between."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._patience_s):
                message = await self._receive()
        except TimeoutError:
            self._lingers = False  # there is nothing to read
            raise BodyTooSlow(
                f"the body comes too slowly: {STRIDE} bytes have {self._body_timeout_s:g} s"
            ) from None
        self._patience_s -= time.monotonic() - began
        self._stride += len(message.get("body", b""))
        if self._stride >= STRIDE:
            self._stride, self._patience_s = 0, self._body_timeout_s
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._unread:
            message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and self._unread and self._lingers:
            await self._send({**message, "more_body": True})
            await self._drop_rest()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
        self.complete = last

    async def _drop_rest(self) -> None:
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._unread and time.monotonic() < end:
                    message = await self._receive()
                    self._unread = message.get("more_body", False)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises UnsupportedMediaType, PayloadTooLarge or InvalidRequest.

    Stricter than the json module: no duplicate keys (a gateway may have read the other one), no
    NaN or Infinity, no lone surrogates, UTF-8 only.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("content-type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("content-encoding is not supported: send the body as it is")
    return parse_json(await request.body())


def parse_json(raw: bytes) -> dict[str, Any]:
    """``read_json`` without the request around it."""
    constants: list[str] = []

    def constant(text: str) -> float:
        constants.append(text)
        return float(text.replace("Infinity", "inf"))

    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply", code="invalid_json") from None
    except ValueError:  # JSONDecodeError, and int's limit on the number of digits
        raise InvalidRequest("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json")
    if constants:
        _refuse(body, _not_finite, "NaN and Infinity are not JSON")
    if _SURROGATE_ESCAPE.search(raw):
        _refuse(body, _lone_surrogate, "a string contains a lone surrogate")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("an object has the same key twice", code="invalid_json")
    return found


def _refuse(body: dict[str, Any], bad: Callable[[Any], bool], why: str) -> None:
    for key, value in body.items():
        if bad(key):
            raise InvalidRequest(why, code="invalid_json")
        if any(bad(leaf) for leaf in _leaves(value)):
            raise InvalidRequest(f"{key[:64]}: {why}", param=key[:64])


def _leaves(value: Any) -> Iterator[Any]:
    """Every key and scalar below ``value``; a stack of its own, as the input picks the depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        else:
            yield item


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and (value != value or value in (float("inf"), -float("inf")))


def _lone_surrogate(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)
