"""The TCP side of a request: bounds on headers, trailers, patience and the number of connections,
which uvicorn does not have.

uvicorn's httptools parser keeps request headers of any size and waits for them for ever, and its
connections keep an answer for ever that nobody reads; an ASGI application is asked afterwards, or
is over before. So the bounds sit in the protocol class itself.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import resource
import sys
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from loramux.config import ServerConfig
from loramux.errors import InvalidRequest, LoramuxError, Overloaded, RequestError
from loramux.http.failures import GUARDING, error_body

MAX_HEAD_BYTES = 32 << 10
"""Request line and headers together."""
MAX_HEADERS = 128

STRIDE = 64 << 10
"""So many bytes of a body have ``body_timeout_s`` to come, and of an answer ``write_timeout_s`` to
go: at the defaults 2 KiB a second, which any network has and a client that drips bytes to hold a
place has not."""

WRITE = "loramux.write"
"""Key in ``scope["extensions"]``: ``write(piece) -> bool`` sends a piece of a begun answer's body
at once, or says no when the client is behind or gone: then ``send`` waits, or knows what to do."""


_turns = itertools.count()
"""In which order connections came: the loop's clock has the same time for several."""


class HeadTooLarge(RequestError):
    """The request line and headers are larger than MAX_HEAD_BYTES or more than MAX_HEADERS."""

    status = 431
    code = "headers_too_large"


class BoundedConnection(HttpToolsProtocol):
    """A connection whose request head must be small (431) and arrive within ``head_timeout_s``.

    A head that is late is answered by closing the connection: there is nothing to answer yet. What
    follows a body in chunks (trailers) is not looked at, and may not be larger than a head either.
    An answer must be taken: each STRIDE bytes within ``write_timeout_s``, or the rest is dropped.
    Of more than ``most`` connections the oldest that has no request gives way; if all have, 503.
    A client that offers another protocol (Java's and curl's offer HTTP/2) goes on with this one.
    """

    head_timeout_s = 10.0
    write_timeout_s = 30.0
    most = 512

    _head_bytes = 0
    _in_head = True
    _bytes_beside_body = 0
    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _refusal: LoramuxError | None = None
    _turn = 0
    _received = b""
    _answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._turn = next(_turns)
        self._wait_for_head()
        if len(self.connections) > self.most:
            self._make_room()

    def _make_room(self) -> None:
        staying = [
            connection
            for connection in self.connections
            if isinstance(connection, BoundedConnection) and not connection.transport.is_closing()
        ]
        if len(staying) <= self.most:  # who gave way to one before is not quite gone yet
            return
        idle = [
            connection for connection in staying if connection.is_idle and connection is not self
        ]
        if idle:
            min(idle, key=lambda connection: connection._turn).transport.abort()
        else:
            self._refusal = Overloaded(f"{self.most} connections are busy already")
            self.send_400_response("")

    @property
    def is_idle(self) -> bool:
        """No request is being answered on it."""
        return self.cycle is None or self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        super().connection_lost(exc)
        # uvicorn tells the newest request only, which is not the one that is being answered when
        # the client sent several without waiting.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.scope["state"]["gone"] = True  # for logs and traces
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self.is_idle and self._head_timer is None:
            self._wait_for_head()  # uvicorn's keep-alive clock stops at any byte, a stray one too
        self._bytes_beside_body += len(data)
        self._received = data
        super().data_received(data)
        self._received = b""
        if self._in_head and not self.transport.is_closing():
            # httptools hands over a header only once it is whole, so bytes are counted here.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refusal = HeadTooLarge(f"headers exceed {MAX_HEAD_BYTES} bytes")
                self.send_400_response("")
        elif self._bytes_beside_body > MAX_HEAD_BYTES + len(data):
            # httptools would keep a trailer of any size, and hands it over only once it is whole.
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True
        self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer: it came after everything was decided by the headers
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._bytes_beside_body = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._in_head = False
        self._bytes_beside_body = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = HeadTooLarge(
                f"headers exceed {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} in number"
            )
            raise self._refusal
        extensions = self.scope["extensions"] = {}
        super().on_headers_complete()
        extensions[WRITE] = {"call": functools.partial(_write, self.cycle)}

    def _should_upgrade(self) -> bool:
        return True  # then uvicorn leaves the request to the method below

    def handle_websocket_upgrade(self) -> None:
        """The request once more, without its offer: to the parser an offer ends the request with
        its head, and would make the body the next one."""
        ended = sys.exception()
        assert isinstance(ended, httptools.HttpParserUpgrade)
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self.send_400_response("")
            return
        kept = [header for header in self.headers if header[0] != b"upgrade"]
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
        head += [b"%b: %b\r\n" % header for header in kept]
        super().data_received(b"".join([*head, b"\r\n", self._received[ended.args[0] :]]))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when a request cannot be parsed; ours speaks OpenAI's error shape."""
        refusal = self._refusal or InvalidRequest("not a valid HTTP request", code="bad_http")
        body = error_body(refusal)
        head = [
            STATUS_LINE[refusal.status],
            b"content-type: application/json\r\n",
            *(b"%b: %b\r\n" % header for header in GUARDING),
            b"content-length: %d\r\n" % len(body),
            b"connection: close\r\n\r\n",
        ]
        self._stop_waiting()
        self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """From now on nothing is added to what waits for the client, or not before it has taken
        most of it: so that shrinks in time, or nobody reads."""
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        waits = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self.write_timeout_s, self._look, waits)

    def _look(self, waited: int) -> None:
        waits = self.transport.get_write_buffer_size()
        answers = not (self.is_idle or self.flow.write_paused)
        if answers or not waits:
            return
        if waits > waited - STRIDE:
            self.transport.abort()
        else:
            self._watch_reader()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _write(answer: RequestResponseCycle, piece: bytes) -> bool:
    """What ``send`` does with a chunk, without the wrappers that each layer of the application puts
    around it: most of a streamed token's way is theirs."""
    waits = answer.flow.write_paused or answer.disconnected or answer.response_complete
    if waits or not answer.chunked_encoding:
        return False
    answer.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    return True


MAX_OPEN_FILES = 1 << 16


def most_connections() -> int:
    """Half of the files this process may have open, its limit raised as far as it may be: the usual
    one of 1024 is for programs that use select. The other half is for adapters' files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most // 2


def uvicorn_config(app: ASGIApp, config: ServerConfig, *, port: int) -> uvicorn.Config:
    """How loramux's applications are served; the admin one differs by ``port`` only."""

    class Connection(BoundedConnection):
        head_timeout_s = config.header_timeout_s
        write_timeout_s = config.write_timeout_s
        most = config.max_connections or most_connections()

    return uvicorn.Config(
        app,
        host=config.host,
        port=port,
        http=Connection,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(config.drain_s),
        log_level=config.log_level,
        access_log=False,  # uvicorn's has raw paths and queries; ours is http/access_log
        server_header=False,
        date_header=False,
    )
