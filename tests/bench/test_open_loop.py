"""The open loop: planned times, its own lateness, and what it makes of a server's answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from loramux.bench.open_loop import Bounds, Failure, Live, Now, Record, Run, send
from loramux.bench.openai import OpenAi
from loramux.bench.traffic import Arrival


def plan(*times: float, adapter: int = 0, output: int = 5) -> list[Arrival]:
    return [Arrival(at, adapter, 8, i, 10, output, False) for i, at in enumerate(times)]


def test_everybody_is_sent_though_nobody_answers() -> None:
    """A closed loop would wait here for ever: the first answer comes when the last was sent."""
    last = asyncio.Event()

    async def ask(index: int, record: Record, now: Now) -> None:
        if index == 9:
            last.set()
        await last.wait()
        record.chunks_s.append(now())
        record.finish(now(), 10, 5)

    run = asyncio.run(send(plan(*[0.0] * 10), ask, drain_s=30))
    assert [record.status for record in run.records] == ["ok"] * 10
    assert run.bottleneck(Bounds(lag_s=10, stall_s=10)) is None


def test_nobody_leaves_before_the_planned_time() -> None:
    async def ask(index: int, record: Record, now: Now) -> None:
        record.finish(now(), 1, 1)

    run = asyncio.run(send(plan(0.0, 0.02, 0.021, 0.1), ask, drain_s=5))
    assert all(record.sent_s >= record.arrival.at_s for record in run.records)


def test_what_has_not_ended_stays_incomplete_and_is_ended() -> None:
    ended: list[int] = []

    async def ask(index: int, record: Record, now: Now) -> None:
        if index == 0:
            record.finish(now(), 1, 1)
            return
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(index)

    run = asyncio.run(send(plan(0.0, 0.0, 0.0), ask, drain_s=0.05))
    assert [record.status for record in run.records] == ["ok", "incomplete", "incomplete"]
    assert sorted(ended) == [1, 2]


def test_a_failure_is_counted_and_a_fault_of_the_client_is_raised() -> None:
    async def fails(index: int, record: Record, now: Now) -> None:
        raise Failure("503 overloaded")

    [record] = asyncio.run(send(plan(0.0), fails, drain_s=5)).records
    assert (record.status, record.error) == ("error", "503 overloaded")

    async def breaks(index: int, record: Record, now: Now) -> None:
        raise KeyError("usage")

    with pytest.raises(KeyError):
        asyncio.run(send(plan(0.0), breaks, drain_s=5))


def test_a_client_that_stands_still_says_so() -> None:
    async def blocks(index: int, record: Record, now: Now) -> None:
        time.sleep(0.1)  # the others are due meanwhile
        record.finish(now(), 1, 1)

    run = asyncio.run(send(plan(0.0, 0.01, 0.02), blocks, drain_s=5))
    told = run.bottleneck(Bounds(lag_s=0.03, stall_s=99))
    assert told is not None and "left late" in told
    assert max(run.stalls_s) > 0.05
    told = Run(run.records, 1.0, [0.0] * 9 + [0.5], 0.5).bottleneck(Bounds(lag_s=99))
    assert told is not None and "stood still" in told
    assert Run(run.records, 1.0, [0.0] * 9, 0.5).bottleneck(Bounds(lag_s=99)) is None


def test_a_watcher_sees_the_run_grow_and_end() -> None:
    seen: list[tuple[int, int]] = []

    async def ask(index: int, record: Record, now: Now) -> None:
        record.finish(now(), 1, 1)

    def show(live: Live) -> None:
        seen.append((live.sent, live.done))

    asyncio.run(send(plan(0.0, 0.0), ask, drain_s=5, show=show))
    assert seen[0] == (0, 0) and seen[-1] == (2, 2)


USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}], "usage": None, **more}


@dataclass
class Scripted:
    """A server that answers every request with the same bytes, whatever it was."""

    answer: bytes
    requests: list[dict[str, Any]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.requests.append(json.loads(await reader.readexactly(length)))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


def stream(*events: dict[str, Any] | str) -> bytes:
    body = "".join(
        f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events
    )
    return b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n: comment\n\n" + body.encode()


def refused(status: str, body: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return (head + body).encode()


CUT = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n: comment\r\n"


def asked(answer: bytes, **settings: Any) -> tuple[Record, Scripted]:
    """What becomes of one request to a server with this answer."""
    scripted = Scripted(answer)

    async def go() -> Record:
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = OpenAi(
            f"http://127.0.0.1:{port}", "base", ["a0", "a1"], lambda i, n: [i] * n, **settings
        )
        async with server:
            run = await send(plan(0.0, adapter=1), target.ask, drain_s=20)
            await target.close()
        return run.records[0]

    return asyncio.run(go()), scripted


def test_a_stream_is_read_by_its_text_and_counted_by_its_usage() -> None:
    record, scripted = asked(
        stream(
            piece(""),
            piece("ab"),
            piece("", usage={"prompt_tokens": 7, "completion_tokens": 3}),
            piece("c"),
            {"choices": [], "usage": USAGE},
            {"choices": [], "usage": None},
            "[DONE]",
        ),
        extra={"ignore_eos": True},
        keys=["k0"],
    )
    assert record.status == "ok" and len(record.chunks_s) == 2
    assert (record.prompt_tokens, record.completion_tokens) == (7, 9)
    assert record.chunks_s[0] <= record.chunks_s[1] <= record.finished_s
    [request] = scripted.requests
    assert request == {
        "model": "a1",
        "prompt": [0] * 10,
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert b"authorization: bearer k0" in scripted.heads[0].lower()


def test_where_an_answer_is_cut_into_pieces_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aiohttp.StreamReader, "iter_any", lambda body: body.iter_chunked(1))
    record, _ = asked(stream(piece("ab"), piece("é"), {"choices": [], "usage": USAGE}, "[DONE]"))
    assert record.status == "ok" and len(record.chunks_s) == 2
    assert (record.prompt_tokens, record.completion_tokens) == (7, 9)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refused("503 Service Unavailable", '{"error": {"code": "overloaded"}}'), "503 overloaded"),
        (refused("429 Too Many", '{"error": {"type": "limit", "code": null}}'), "429 limit"),
        (refused("400 Bad", '{\n"error": {\n"code": "bad"}}\n'), "400 bad"),
        (refused("500 Oh", "<html>"), "500 error"),
        (refused("500 Oh", "[1]"), "500 error"),
        (stream(piece("a"), {"error": {"code": "engine_failed"}}), "stream engine_failed"),
        (stream(piece("a")), "stream ended early"),
        (CUT, "stream ended early"),
        (stream(piece("a"), {"choices": []}, "[DONE]"), "no usage"),
        (b"", "ServerDisconnectedError"),
        (b"hello\r\n\r\n", "ClientResponseError"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer: bytes, error: str) -> None:
    record, _ = asked(answer)
    assert (record.status, record.error) == ("error", error)


def test_nobody_there_is_named() -> None:
    async def go() -> Record:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        target = OpenAi(f"http://127.0.0.1:{port}", "base", ["a0"], lambda i, n: [i] * n)
        run = await send(plan(0.0), target.ask, drain_s=20)
        await target.close()
        return run.records[0]

    record = asyncio.run(go())
    assert (record.status, record.error) == ("error", "ConnectionRefusedError")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        OpenAi(url, "base", [], lambda i, n: [i] * n)


NUM = 150
WHOLE = stream(piece("a"), {"choices": [], "usage": USAGE}, "[DONE]").partition(b"\r\n\r\n")[2]


@dataclass
class Kept:
    """A server that answers nobody before ``NUM`` have asked, and keeps connections. ``seen``: the
    heads of requests, by connection."""

    seen: list[list[bytes]] = field(default_factory=list)
    all_there: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(mine := [])
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                mine.append(head := await reader.readuntil(b"\r\n\r\n"))
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
                if len(self.seen) == NUM:
                    self.all_there.set()
                await self.all_there.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE)
        writer.close()


def test_so_many_connections_as_requests_at_once_and_no_more() -> None:
    kept = Kept()

    async def go() -> None:
        server = await asyncio.start_server(kept.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = OpenAi(f"http://127.0.0.1:{port}/below/", "base", ["a0"], lambda i, n: [i] * n)
        async with server:
            for _ in range(2):
                run = await send(plan(*[0.0] * NUM), target.ask, drain_s=20)
                assert [record.status for record in run.records] == ["ok"] * NUM
            await target.close()

    asyncio.run(go())
    assert [len(heads) for heads in kept.seen] == [2] * NUM
    assert kept.seen[0][0].startswith(b"POST /below/v1/completions HTTP/1.1\r\n")
