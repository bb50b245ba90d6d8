"""Requests to one server over HTTP/1.1, as cheap as a load client needs them.

A client that shares its cores with the server measures itself if it is slow. An answer's body goes
to a callback as it arrives, without a task that wakes up for every chunk: with httpx a refusal took
1.5 ms of the client's core and 64 chunks 11 ms, so they take 0.4 and 4. Connections are kept, and
never used again after KEEP_S: a server that closes idle ones later than that takes no request with
it. There are no redirects and no proxies.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import httptools

KEEP_S = 2.0
OnBody = Callable[[int, bytes], None]
"""Takes the status and the next piece of the body; what it raises ends the request."""


class NoAnswer(Exception):
    """Nothing came that can be called an answer; the message is the kind of fault."""


class Connections:
    """Connections to the server at ``url``. Raises ValueError for what is no HTTP address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not http://HOST[:PORT] or https://HOST[:PORT]")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._netloc = parts.netloc.rpartition("@")[2]
        self._folder = parts.path.rstrip("/")
        self._idle: list[_Connection] = []

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], on_body: OnBody
    ) -> int:
        """The status, once the answer has ended. Raises NoAnswer.

        An answer that was cut off ends as well: its body has to say whether it is whole.
        """
        lines = [
            f"POST {self._folder}{path} HTTP/1.1",
            f"host: {self._netloc}",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        request = "\r\n".join([*lines, "", ""]).encode() + body
        try:
            connection = self._kept() or await self._open()
        except OSError as error:
            raise NoAnswer(type(error).__name__) from error
        try:
            status = await connection.ask(request, on_body)
            if connection.is_free:
                self._idle.append(connection)
            return status
        finally:
            if not connection.is_free:
                connection.close()

    def _kept(self) -> _Connection | None:
        """The one that was used last, if it may be used again."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_free and time.monotonic() - connection.free_since < KEEP_S:
                return connection
            connection.close()
        return None

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        """Close those that are idle; the others end with their requests."""
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    """One connection; httptools calls its ``on_`` methods."""

    def __init__(self) -> None:
        self.free_since = 0.0
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[int] | None = None
        self._pieces: list[bytes] = []
        self._has_head = self._is_whole = self._keeps = False
        self._is_free = True

    @property
    def is_free(self) -> bool:
        """Open, and nothing is left of the answer before."""
        return self._is_free and not self._transport.is_closing()

    def ask(self, request: bytes, on_body: OnBody) -> asyncio.Future[int]:
        """Send a request; the status when its answer has ended."""
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._has_head = self._is_whole = self._is_free = False
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done() or self._parser is None:
            self.close()  # nobody asked for that
            return
        try:
            self._parser.feed_data(data)
            if self._pieces:
                pieces, self._pieces = self._pieces, []
                self._on_body(self._parser.get_status_code(), b"".join(pieces))
        except httptools.HttpParserError:
            self._answer.set_exception(NoAnswer("not HTTP"))
        except Exception as error:  # the callback's: for who asked
            self._answer.set_exception(error)
        else:
            if self._is_whole:
                self._is_free = self._keeps
                self.free_since = time.monotonic()
                self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is None or self._answer.done() or self._parser is None:
            return
        if self._has_head:
            self._answer.set_result(self._parser.get_status_code())
        else:
            self._answer.set_exception(NoAnswer(type(error).__name__ if error else "no answer"))

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._is_whole, self._keeps = True, self._parser.should_keep_alive()
