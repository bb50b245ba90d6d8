"""Server-sent events, and the two ways to notice that the client has left.

uvicorn tells an application of a disconnect only where it listens: nobody tells a handler that
waits for an answer, and Starlette's StreamingResponse listens or not depending on the server's
ASGI version. So both kinds of answer watch ``receive`` themselves, beside their work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from loramux.errors import LoramuxError, Overloaded
from loramux.front.generation import Delta
from loramux.http.answers import encode
from loramux.http.choices import Choices
from loramux.http.connection import WRITE
from loramux.http.failures import error_body, failure, internal_error, tell

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class Answer(Protocol):
    """Turns what the choices produce into one API's objects."""

    def whole(self, outputs: list[Delta]) -> msgspec.Struct:
        """The answer in one piece; ``outputs`` has one finished Delta per choice."""

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as it comes, up to but without ``[DONE]``."""


async def deliver(
    request: Request,
    choices: Choices,
    answer: Answer,
    *,
    stream: bool,
    keep_alive_s: float,
    on_gone: Callable[[], None],
) -> Response:
    """The HTTP answer, streamed or whole; ``on_gone()`` when the client leaves before its end.

    Whatever happens, no choice runs on afterwards.
    """
    headers = choices.headers()
    request.scope["state"]["choices"] = choices  # for logs and traces
    if stream:

        def finish(gone: bool) -> None:
            choices.cancel()
            if gone:
                on_gone()

        return EventStream(
            answer.events(), headers=headers, keep_alive_s=keep_alive_s, finish=finish
        )
    try:
        outputs = await unless_gone(request.receive, choices.collect())
    except ClientDisconnect:
        on_gone()
        raise
    finally:
        choices.cancel()
    return Response(encode(answer.whole(outputs)), media_type="application/json", headers=headers)


def event(payload: msgspec.Struct) -> bytes:
    """One event."""
    return b"data: %b\n\n" % encode(payload)


_LAST: Message = {"type": "http.response.body", "body": b"", "more_body": False}


def _chunk(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _error_event(exc: LoramuxError) -> bytes:
    return b"data: %b\n\n" % error_body(exc)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; when the client leaves first, ``work`` ends and ClientDisconnect."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """A streamed answer: ``events`` are sent as they come, then ``[DONE]``.

    The 200 comes with the first event: a failure before it is answered as one, with the status and
    the Retry-After that clients go by. A failure after the 200 is an ``error`` event and no
    ``[DONE]``: openai-python raises it, and nobody can take the part for the whole.
    ``finish(gone)`` is called exactly once at the end, with ``gone`` true when the client left
    before it. A comment is sent, behind the 200 if need be, when nothing else was for
    ``keep_alive_s``, so that proxies keep the connection.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        headers: dict[str, str],
        keep_alive_s: float,
        finish: Callable[[bool], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body_iterator = events
        self.init_headers(
            {
                **headers,
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )
        self._keep_alive_s = keep_alive_s
        self._finish = finish
        self._last_write = 0.0
        self._begun = False
        self._write_now: Callable[[bytes], bool] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._write_now = scope.get("extensions", {}).get(WRITE, {}).get("call")
        writer = asyncio.create_task(self._write(scope, receive, send))
        watcher = asyncio.create_task(_gone(receive))
        ticker = asyncio.create_task(self._tick(send))
        gone = True
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
                gone = "gone" in scope["state"]  # then it was written to nobody
        except asyncio.CancelledError:
            # Shutting down, and the time to drain is over.
            writer.cancel()
            stopping = Overloaded("the server stops", code="draining")
            await self._fail(stopping, scope, receive, send)
            raise
        finally:
            tasks = (writer, watcher, ticker)
            for task in tasks:
                task.cancel()
            self._finish(gone)  # before any await, where a second cancellation could end us
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator) as events:
            try:
                async for chunk in events:
                    await self._send(send, chunk)
                await self._send(send, DONE)
                await send(_LAST)
            except LoramuxError as exc:
                await self._fail(exc, scope, receive, send)
            except Exception:
                log.exception("internal error in a stream")
                await self._fail(internal_error(), scope, receive, send)

    async def _fail(self, exc: LoramuxError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._begun:
            self._begun = True
            await failure(exc)(scope, receive, send)
            return
        tell(scope, exc, streaming=True)
        await self._send(send, _error_event(exc))
        await send(_LAST)

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._last_write = time.monotonic()
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if self._write_now is None or not self._write_now(chunk):
            await send(_chunk(chunk))

    async def _tick(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._keep_alive_s)
            if time.monotonic() - self._last_write >= self._keep_alive_s:
                await self._send(send, b": keep-alive\n\n")
