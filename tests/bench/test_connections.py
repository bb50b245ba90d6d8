"""A load client's connections: kept when an answer was whole, never shared, not kept for long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from loramux.bench import connections
from loramux.bench.connections import Connections, NoAnswer

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Scripted:
    """A server whose connections all give the same answers, one for each request, and
    then hang up."""

    answers: list[bytes]
    requests: list[list[bytes]] = field(default_factory=list)
    """By connection."""
    serving: list[asyncio.Task[None] | None] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.append(asyncio.current_task())
        self.requests.append(mine := [])
        for answer in self.answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            mine.append(head + await reader.readexactly(length))
            writer.write(answer)
            await writer.drain()
        writer.close()


Use = Callable[[Connections], Awaitable[None]]


def used(use: Use, *answers: bytes, path: str = "") -> Scripted:
    """What a server saw of ``use``."""
    scripted = Scripted(list(answers))

    async def go() -> None:
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        to = Connections(f"http://127.0.0.1:{port}{path}")
        async with server:
            await use(to)
            to.close()
            await asyncio.gather(*filter(None, scripted.serving))

    asyncio.run(go())
    return scripted


async def ask(to: Connections, body: bytes = b"{}") -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status = await to.post("/v1/x", body, {"a": "b"}, lambda _, piece: pieces.append(piece))
    return status, b"".join(pieces)


def test_a_connection_is_used_again_after_a_whole_answer() -> None:
    async def use(to: Connections) -> None:
        assert await ask(to) == (200, b"ok")
        assert await ask(to, b"12345") == (503, b"")

    full = b"HTTP/1.1 503 Full\r\ncontent-length: 0\r\n\r\n"
    [requests] = used(use, WHOLE, full, path="/below/").requests
    assert requests[0].startswith(b"POST /below/v1/x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert requests[0].endswith(b"\r\na: b\r\n\r\n{}") and requests[1].endswith(b"\r\n\r\n12345")


def test_two_requests_at_once_have_a_connection_each() -> None:
    async def use(to: Connections) -> None:
        assert await asyncio.gather(ask(to), ask(to)) == [(200, b"ok")] * 2
        assert await asyncio.gather(ask(to), ask(to)) == [(200, b"ok")] * 2

    assert [len(requests) for requests in used(use, WHOLE, WHOLE).requests] == [2, 2]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",  # cut off
    ],
)
def test_what_the_server_ends_is_an_answer_and_no_connection(answer: bytes) -> None:
    async def use(to: Connections) -> None:
        assert await ask(to) == (200, b"ok")
        assert await ask(to) == (200, b"ok")

    assert [len(requests) for requests in used(use, answer).requests] == [1, 1]


def test_a_connection_that_lay_idle_for_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEP_S", 0.0)

    async def use(to: Connections) -> None:
        await ask(to)
        await ask(to)

    assert [len(requests) for requests in used(use, WHOLE, WHOLE).requests] == [1, 1]


def test_a_chunk_comes_without_its_frame() -> None:
    async def use(to: Connections) -> None:
        assert await ask(to) == (200, b"data: a\n\ndata: b\n\n")

    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    used(use, head + b"9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_server_that_hangs_up_gave_no_answer(answer: bytes) -> None:
    async def use(to: Connections) -> None:
        with pytest.raises(NoAnswer, match="no answer"):
            await ask(to)

    used(use, answer)


def test_nobody_there_is_named() -> None:
    async def go() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        with pytest.raises(NoAnswer, match="ConnectionRefusedError"):
            await ask(Connections(f"http://127.0.0.1:{port}"))

    asyncio.run(go())


def test_a_request_that_is_given_up_takes_its_connection_with_it() -> None:
    async def use(to: Connections) -> None:
        with pytest.raises(ZeroDivisionError):
            await to.post("/v1/x", b"{}", {}, lambda status, piece: [1 // 0])
        hangs = asyncio.create_task(ask(to))
        await asyncio.sleep(0)
        hangs.cancel()
        await asyncio.gather(hangs, return_exceptions=True)
        assert await ask(to) == (200, b"ok")

    assert [len(r) for r in used(use, WHOLE, WHOLE).requests if r] == [1, 1]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        Connections(url)
