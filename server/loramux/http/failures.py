"""How every failure looks to a client: one JSON shape, one header of identity, honest retry hints.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

That is OpenAI's shape, so its clients raise their typed errors. Messages name the parameter and
never repeat what was sent. ``x-should-retry`` overrides the client's own guess (openai-python
would otherwise repeat every 409 and 507).
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.errors import (
    InvalidRequest,
    LoramuxError,
    NotFound,
    RequestError,
    UploadOffsetConflict,
)

log = logging.getLogger(__name__)

CLIENT_GONE = "client_gone"
"""What logs and traces call the failure of a request whose client left before its end."""

GUARDING = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
)
"""What every answer says to browsers and caches, unless it says otherwise itself: no guessing of
content types, no copies of what may be private, no framing."""

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""A client's x-request-id is used only if it could go into a log line and a header as it is."""


def error_object(exc: LoramuxError) -> dict[str, Any]:
    """The ``{"error": ...}`` object of one error. ``problems`` is there when there are several."""
    error: dict[str, Any] = {
        "message": exc.message,
        "type": exc.type,
        "param": exc.param,
        "code": exc.code,
    }
    if problems := getattr(exc, "problems", ()):
        error["problems"] = list(problems)
    return {"error": error}


def error_body(exc: LoramuxError) -> bytes:
    """The JSON body of one error."""
    return msgspec.json.encode(error_object(exc))


def internal_error() -> LoramuxError:
    """What a client learns of a bug of ours: nothing but that it was one."""
    return LoramuxError("the server met an internal error; the log has it under the x-request-id")


class Failure(Response):
    """The HTTP answer for one error, which leaves the error in the scope's state."""

    def __init__(self, exc: LoramuxError, status: int, headers: dict[str, str]) -> None:
        super().__init__(error_body(exc), status, headers, media_type="application/json")
        self._error = exc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tell(scope, self._error)
        await super().__call__(scope, receive, send)


def tell(scope: Scope, exc: LoramuxError, *, streaming: bool = False) -> None:
    """The client of this request is being told of ``exc``."""
    scope["state"]["told"] = exc, streaming


def failure(exc: LoramuxError, *, status: int | None = None) -> Response:
    """The HTTP answer for one error; ``status`` where HTTP itself refuses (405)."""
    headers = {}
    if exc.retry is not None:
        headers["x-should-retry"] = "true" if exc.retry else "false"
    retry_after_s: float | None = getattr(exc, "retry_after_s", None)
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(exc, UploadOffsetConflict):
        headers["upload-offset"] = str(exc.upload_offset)
    return Failure(exc, status or exc.status, headers)


def invalid(errors: Sequence[Any]) -> InvalidRequest:
    """pydantic's findings as one error: the first, in words that contain nothing of the input.

    ``param`` is the top-level field; positions inside a list are appended (``messages[2]``), keys
    are not, since a key may be the caller's own text.
    """
    first = errors[0]
    path = [part for part in first["loc"] if part not in ("body", "query", "path")]
    ours = first["type"] == "missing"  # then every part of the path is a name of our own schema
    param = str(path[0]) if path else None
    for part in path[1:]:
        if isinstance(part, int):
            param = f"{param}[{part}]"
        elif ours:
            param = f"{param}.{part}"
        else:
            break
    text = "this field is required" if ours else first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {text[:1].lower()}{text[1:]}", param=param)


async def _on_loramux_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, LoramuxError)
    return failure(exc)


async def _on_query_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return failure(invalid(exc.errors()))


async def _on_http_error(_: Request, exc: Exception) -> Response:
    """Starlette's own refusals: no such route, or not with this method."""
    assert isinstance(exc, HTTPException)
    refusal: RequestError
    if exc.status_code == 404:
        refusal = NotFound("no such route", code="route_not_found")
    elif exc.status_code == 405:
        refusal = RequestError("this route does not take that method", code="method_not_allowed")
    else:
        refusal = RequestError("the request cannot be served")
    answer = failure(refusal, status=exc.status_code)
    answer.headers.update(exc.headers or {})
    return answer


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=400)


async def _on_bug(request: Request, exc: Exception) -> Response:
    log.error("internal error, request %s", request.scope["state"]["request_id"], exc_info=exc)
    return failure(internal_error())


def install(app: FastAPI) -> None:
    """Makes every failure of ``app`` come out in the shape above."""
    app.add_exception_handler(LoramuxError, _on_loramux_error)
    app.add_exception_handler(RequestValidationError, _on_query_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


class RequestIds:
    """Pure ASGI: gives every request an id, and every answer, errors included, its x-request-id and
    the headers of GUARDING."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        known = len(given) == 1 and REQUEST_ID.fullmatch(given[0])
        request_id = given[0] if known else secrets.token_hex(16).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id)]
                said = {name.lower() for name, _ in headers}
                headers += [header for header in GUARDING if header[0] not in said]
                message["headers"] = headers
            await send(message)

        await self.app(scope, receive, send_with_id)
