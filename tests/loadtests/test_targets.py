"""What a plan is sent to in this process, and a peer that takes batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from targets import Batches, InProcess

from loramux.bench.open_loop import Now, Record, send
from loramux.bench.traffic import Arrival


def plan(*times: float, adapter: int = 0, output: int = 5) -> list[Arrival]:
    return [Arrival(at, adapter, 8, i, 10, output, False) for i, at in enumerate(times)]


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
