"""Sending a plan open loop: requests leave at their planned times, whatever became of the others.

A client that cannot keep up measures itself. So a run also says how late requests left (*lag*) and
how late the event loop woke up beside them (*stall*: the time by which any arriving chunk may have
been read too late), and ``Run.bottleneck`` names the one that went beyond its bound.

Times are seconds of the monotonic clock since the start of the run. A request's latencies count
from its *planned* time, so lag can only make them look worse.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from loramux.bench.traffic import Arrival

TICK_S = 0.02
Status = Literal["ok", "error", "incomplete"]


@dataclass
class Record:
    """What became of one request.

    ``chunks_s`` are the times at which chunks with text arrived; a chunk may hold several tokens,
    so tokens are never counted by them: ``completion_tokens`` is what the server's usage says.
    ``status`` is incomplete until the request ends; ``error`` names the kind of failure.
    """

    arrival: Arrival
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    finished_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: Status = "incomplete"
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Planned time to the first chunk with text; to the end where none had any."""
        first = self.chunks_s[0] if self.chunks_s else self.finished_s
        return first - self.arrival.at_s

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float | None:
        """(latency - TTFT) / (n - 1); None for a single token, and for an answer in one piece."""
        if self.completion_tokens < 2 or len(self.chunks_s) < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.completion_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """The gaps between chunks with text."""
        return [b - a for a, b in zip(self.chunks_s, self.chunks_s[1:], strict=False)]

    def finish(self, now_s: float, prompt_tokens: int, completion_tokens: int) -> None:
        """It ended well."""
        self.finished_s, self.status = now_s, "ok"
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens

    def fail(self, now_s: float, error: str) -> None:
        """It ended otherwise; ``error`` is a kind, with few different values."""
        self.finished_s, self.status, self.error = now_s, "error", error


class Failure(Exception):
    """A request that failed; the message is the kind, as it will be counted."""


Now = Callable[[], float]
Ask = Callable[[int, Record, Now], Awaitable[None]]
"""Asks for the plan's request of that index: appends to ``chunks_s``, calls ``finish``, or raises
Failure."""


@dataclass
class Bounds:
    """How much the client may be late before its figures mean nothing: 99th percentiles."""

    lag_s: float = 0.05
    stall_s: float = 0.05


@dataclass
class Run:
    """All records in the order of the plan, and how the client itself did."""

    records: list[Record]
    seconds: float
    stalls_s: list[float]
    cpu_share: float
    """CPU seconds of this process a second of the run."""

    @property
    def lag_p99_s(self) -> float:
        """How late requests left, 99th percentile."""
        return float(np.percentile([r.sent_s - r.arrival.at_s for r in self.records], 99))

    @property
    def stall_p99_s(self) -> float:
        """How late the event loop woke up, 99th percentile."""
        return float(np.percentile(self.stalls_s, 99)) if self.stalls_s else 0.0

    def bottleneck(self, bounds: Bounds) -> str | None:
        """Why the client and not the server was measured, or None."""
        for name, value, bound in (
            ("requests left late", self.lag_p99_s, bounds.lag_s),
            ("the event loop stood still", self.stall_p99_s, bounds.stall_s),
        ):
            if value > bound:
                return (
                    f"the client was the bottleneck: {name}, p99 {value * 1e3:.0f} ms"
                    f" (bound {bound * 1e3:.0f} ms; it used {self.cpu_share:.0%} of a core)"
                )
        return None


class Live:
    """Counts of a run that is going on, for whoever shows them."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.sent = 0
        self.done = 0
        self.now_s = 0.0


async def send(
    plan: Sequence[Arrival],
    ask: Ask,
    *,
    drain_s: float,
    show: Callable[[Live], None] = lambda live: None,
    show_every_s: float = 0.25,
) -> Run:
    """Ask for everything in ``plan`` at its time, wait at most ``drain_s`` after the last one left;
    what has not ended by then stays incomplete."""
    records = [Record(arrival) for arrival in plan]
    live = Live(records)
    stalls: list[float] = []
    cpu, start = time.process_time(), time.monotonic()

    def now() -> float:
        return time.monotonic() - start

    async def one(index: int) -> None:
        record = records[index]
        record.sent_s = now()
        live.sent += 1
        try:
            await ask(index, record, now)
        except Failure as failure:
            record.fail(now(), str(failure))
        finally:
            live.done += 1

    watchers = [
        asyncio.create_task(_watch_loop(stalls)),
        asyncio.create_task(_show(live, show, now, show_every_s)),
    ]
    tasks: set[asyncio.Task[None]] = set()
    try:
        for index, arrival in enumerate(plan):
            await asyncio.sleep(max(0.0, arrival.at_s - now()))
            tasks.add(asyncio.create_task(one(index)))
        _, late = await asyncio.wait(tasks, timeout=drain_s)
        seconds, cpu = now(), time.process_time() - cpu
    finally:
        for task in (*watchers, *tasks):
            task.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):  # the client's own fault: nothing was measured
            raise end
    live.now_s = seconds
    show(live)
    assert len(late) == sum(record.status == "incomplete" for record in records)
    return Run(records, seconds, stalls, cpu / seconds)


async def _watch_loop(stalls: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(TICK_S)
        stalls.append(time.monotonic() - before - TICK_S)


async def _show(live: Live, show: Callable[[Live], None], now: Now, every_s: float) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            live.now_s = now()
            show(live)
            await asyncio.sleep(every_s)
