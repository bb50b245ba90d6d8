"""The soak: how it judges, and a short one against a real server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soak
import soak_memory
from soak_memory import Sample

from loramux.bench.open_loop import Record, Run
from loramux.bench.traffic import Arrival

IDLE = {
    "total": 10,
    "free": 4,
    "kv": 0,
    "prefix": 3,
    "adapter_leased": 0,
    "adapter_warm": 3,
    "loading": 0,
}


def test_the_books_of_an_idle_server_balance() -> None:
    assert soak.books(IDLE, 0, ["a0", "a1"]) == []
    for frames, unfinished, names, told in (
        (IDLE | {"free": 3}, 0, [], "not the total"),
        (IDLE | {"kv": 1, "free": 3}, 0, [], "1 frames are kv"),
        (IDLE | {"adapter_leased": 3, "adapter_warm": 0}, 0, [], "3 frames are adapter_leased"),
        (IDLE | {"loading": 2, "free": 2}, 0, [], "2 frames are loading"),
        (IDLE, 1, [], "1 requests are unfinished"),
        (IDLE, 0, ["a0", "u17"], "adapter u17 was left behind"),
    ):
        [found] = soak.books(frames, unfinished, names)
        assert told in found


def test_only_a_death_of_our_doing_explains_a_failure() -> None:
    def record(sent: float, end: float, status: str) -> Record:
        made = Record(Arrival(sent, 2, 8, 0, 4, 4, False), sent, finished_s=end)
        made.status, made.error = status, "" if status != "error" else "503 overloaded"  # type: ignore[assignment]
        return made

    log = soak.Log(down=[(100.0, 110.0)])
    records = [
        record(80.0, 85.0, "ok"),
        record(80.0, 88.0, "error"),  # over before the engine died
        record(81.0, 95.0, "error"),  # under way when it died, 5 s of offset included
        record(96.0, 97.0, "error"),  # asked while there was none
        record(106.0, 107.0, "error"),  # asked when the next one was there
        record(107.0, 0.0, "incomplete"),
    ]
    told = soak.unexplained(Run(records, 200.0, [], 0.0), log, 5.0)
    assert told == [
        "85 s, stream of a2: 503 overloaded",
        "111 s, stream of a2: 503 overloaded",
        "112 s, stream of a2: no end",
    ]


def life(role: str, pid: int, begin: float, start_mb: float, slope: float) -> list[Sample]:
    """Two minutes of a process, a sample each second; it grows by ``slope`` a minute, after a first
    half minute in which it grows much faster."""
    return [
        Sample(begin + t, role, pid, start_mb + slope * t / 60 + 10 * min(t, 30))
        for t in range(120)
    ]


def test_growth_is_each_process_own_and_its_beginning_does_not_count() -> None:
    samples = life("front", 1, 0, 100, 0) + life("engine", 2, 0, 500, 3)
    samples += life("engine", 3, 120, 100, 3)  # its successor begins lower
    assert soak_memory.growth_mb_per_minute(samples, 31) == {"front": 0.0, "engine": 3.0}
    assert soak_memory.growth_mb_per_minute(samples, 0)["front"] > 50
    assert soak_memory.growth_mb_per_minute(samples, 1000) == {}


def test_a_processs_memory_is_read() -> None:
    mb = soak_memory.anonymous_mb(os.getpid())
    assert mb is not None and mb > 0
    assert soak_memory.anonymous_mb(2**22 + 1) is None


@pytest.mark.slow  # a server, two minutes of traffic and a killed engine
@pytest.mark.timeout(900)
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    # The bound is wide: in so short a time what is allocated once looks like growth.
    asked = ["--minutes", "1.5", "--fault-every", "12", "--settle", "10"]
    asked += ["--most-mb-a-minute", "200", "--folder", str(tmp_path), "--out", str(tmp_path)]
    assert soak.main(asked) == 0
