"""The open loop: planned times, its own lateness, and what it makes of a server's answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from open_loop import Bounds, Failure, Live, Now, Record, Run, send
from targets import Batches, InProcess, OpenAi
from traffic import Arrival


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


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refused("503 Service Unavailable", '{"error": {"code": "overloaded"}}'), "503 overloaded"),
        (refused("429 Too Many", '{"error": {"type": "limit", "code": null}}'), "429 limit"),
        (refused("500 Oh", "<html>"), "500 error"),
        (refused("500 Oh", "[1]"), "500 error"),
        (stream(piece("a"), {"error": {"code": "engine_failed"}}), "stream engine_failed"),
        (stream(piece("a")), "stream ended early"),
        (stream(piece("a"), {"choices": []}, "[DONE]"), "no usage"),
        (b"", "no answer"),
        (b"hello\r\n\r\n", "not HTTP"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer: bytes, error: str) -> None:
    record, _ = asked(answer)
    assert (record.status, record.error) == ("error", error)


@dataclass
class Output:
    request_id: str
    token_ids: list[int]


@dataclass
class Done:
    outputs: list[Output]
    finished: list[Output]


class Stepped:
    """An engine that makes one token a step for each request."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.submitted: list[tuple[int, int, str]] = []
        self.dropped: set[str] = set()
        self.before_step: Callable[[], None] = lambda: None

    def submit(self, prompt: list[int], num_new: int, digest: str) -> str:
        self.submitted.append((len(prompt), num_new, digest))
        self.left[str(len(self.submitted))] = num_new
        return str(len(self.submitted))

    def step(self) -> Done:
        self.before_step()
        outputs = [Output(name, [1]) for name in self.left]
        self.left = {name: left - 1 for name, left in self.left.items()}
        finished = [Output(name, []) for name, left in self.left.items() if not left]
        for each in finished:
            del self.left[each.request_id]
        return Done(outputs, finished)

    def drop(self, unfinished: set[str]) -> None:
        self.dropped = unfinished


def drive(engine: Stepped, arrivals: list[Arrival], drain_s: float = 20) -> list[Record]:
    async def go() -> list[Record]:
        target = InProcess(engine, ["d0", "d1"], lambda i, n: [i] * n)
        try:
            return (await send(arrivals, target.ask, drain_s=drain_s)).records
        finally:
            await target.close()

    return asyncio.run(go())


def test_an_engine_in_this_process_is_asked_for_the_same() -> None:
    engine = Stepped()
    records = drive(engine, plan(0.0, 0.0, 0.01, adapter=1, output=3))
    assert sorted(engine.submitted) == [(10, 3, "d1")] * 3
    assert all(r.status == "ok" and r.completion_tokens == 3 for r in records)
    assert all(len(r.chunks_s) == 3 for r in records) and engine.dropped == set()


def test_an_engine_is_rid_of_what_was_not_done_and_its_failure_is_raised() -> None:
    engine = Stepped()
    [record] = drive(engine, plan(0.0, output=10**9), drain_s=0.05)
    assert record.status == "incomplete" and engine.dropped == {"1"}

    def breaks() -> None:
        raise RuntimeError("the pool is broken")

    engine = Stepped()
    engine.before_step = breaks
    with pytest.raises(RuntimeError, match="the pool is broken"):
        drive(engine, plan(0.0, 0.0))


def test_a_batch_peer_gets_what_waits_and_no_more_than_fits() -> None:
    sizes: list[list[int]] = []
    all_wait = threading.Event()

    def generate(batch: list[tuple[int, Record]]) -> list[list[int]]:
        assert all_wait.wait(20)
        sizes.append([index for index, _ in batch])
        return [[1] * record.arrival.output_tokens for _, record in batch]

    async def go() -> list[Record]:
        target = Batches(generate, 2)

        async def ask(index: int, record: Record, now: Now) -> None:
            if index == 4:
                asyncio.get_running_loop().call_soon(all_wait.set)
            await target.ask(index, record, now)

        run = await send(plan(*[0.0] * 5), ask, drain_s=20)
        await target.close()
        return run.records

    records = asyncio.run(go())
    assert all(record.status == "ok" and record.completion_tokens == 5 for record in records)
    assert all(record.tpot_s is None for record in records), "nothing is streamed"
    assert sum(sizes, []) == [0, 1, 2, 3, 4] and max(map(len, sizes)) == 2
