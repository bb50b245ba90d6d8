"""What an overload says of itself: recovery and refusals, by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import UTC, datetime, timedelta

import overload

from loramux.bench.open_loop import Record
from loramux.bench.traffic import Arrival

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def record(at_s: float, ttft_s: float | None) -> Record:
    made = Record(Arrival(at_s, 0, 8, 0, 1, 64, False))
    if ttft_s is None:
        made.fail(at_s + 0.01, "503 overloaded")
    else:
        made.chunks_s = [at_s + ttft_s]
        made.finish(at_s + ttft_s + 1, 1, 64)
    return made


def line(at_s: float, status: int, duration_s: float) -> str:
    time = (BEGIN + timedelta(seconds=at_s)).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "status": status, "duration_s": duration_s})


def test_recovery_ends_with_the_last_late_first_token_or_refusal() -> None:
    fast = [record(at / 10, 0.1) for at in range(100)]
    assert overload.recovery_s(fast, 0.1) == 0.0
    slow = [record(0.55, 0.3), record(1.55, None), record(2.05, 0.3)]
    late = sorted(fast[:30] + slow, key=lambda r: r.arrival.at_s)
    assert overload.recovery_s(late, 0.1) == 2.05
    assert overload.recovery_s(late, 0.2) == 0.0, "one in twenty may be"
    assert overload.recovery_s(sorted(fast + slow[:1], key=lambda r: r.arrival.at_s), 0.1) == 0.0
    never = [record(at / 10, None) for at in range(100)]
    assert overload.recovery_s(never, 0.1) == 9.9, "nobody came after it"


def test_only_refusals_of_the_phase_are_the_phases() -> None:
    log = "\n".join(
        [
            "INFO    ready",
            line(-0.1, 503, 9.0),
            line(0.0, 503, 0.01),
            line(1.0, 200, 5.0),
            line(1.5, 503, 0.02),
            line(2.0, 503, 9.0),
        ]
    )
    assert overload.refusals(log, BEGIN, BEGIN + timedelta(seconds=2)) == [0.01, 0.02]


def test_every_adapter_list_is_asked_for_as_often_and_is_another() -> None:
    arrivals = overload.plan(200.0, 20.0, seed=1)
    counts = Counter(arrival.adapter for arrival in arrivals)
    assert len(arrivals) == 4000 and len(counts) == overload.KEYS
    assert max(counts.values()) < 1.4 * min(counts.values())
    client = overload.Client("http://127.0.0.1:1")
    bodies = [client.body(0, Record(arrival)) for arrival in arrivals]
    assert len({json.dumps(body["adapters"]) for body in bodies}) == overload.KEYS
    assert len({body["prompt"] for body in bodies}) == len(bodies), "no prefix is known"
    assert {body["max_tokens"] for body in bodies} == {overload.TOKENS}


def test_nothing_to_count_is_none() -> None:
    assert overload.in_ms("x", [], 50) == {"x_p50_ms": None}
    told = overload.in_ms("x", [0.1, 0.2], 50, 99)
    assert math.isclose(told["x_p50_ms"] or 0, 150.0) and set(told) == {"x_p50_ms", "x_p99_ms"}
