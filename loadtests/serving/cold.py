"""What the first request of a cold adapter waits for, and what its load costs the others.

    python loadtests/serving/cold.py [--quick]

The model is the 135M shape of ``throughput.py``. First-token time is that of a request of 32 prompt
tokens whose adapter has to be loaded, less that of the same request right before or after it, when
its adapter is there (pairs in the order A B B A). It is given as a multiple of the copy's own time:
reading the same packed file into frames on an idle engine, checksum included, in the same pair. The
file is in the page cache. A/A is a warm request less the next warm one, in copies.

Beside 8 decoding rows a load is asked for, and seen to be there, between two steps. So what it adds
is whole steps, however short the copy; the table has the step's time to compare with.

Inter-token time is the time of a step of 8 warm rows, measured in turns without loads and with 50
loads, one asked for before each step as long as no more than two are on their way.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import report
import throughput
from cases import write_base
from workload import Served

from loramux.memory.frames import Owner

RANKS = (8, 16, 64)
BACKGROUND_RANK = 16
DECODING = 8
PROMPT = 32
LONGEST = 1536
LOADS = 50
CYCLE = 4
FRAMES = 2048


class Bench:
    """The engine, the prompt, and rows that decode beside it."""

    def __init__(self, folder: Path) -> None:
        base = write_base(folder / "base", throughput.SHAPE)
        self.served = Served(base, folder / "data", FRAMES)
        self.residency = self.served.engine.residency
        rng = np.random.default_rng(0)
        self.prompt = rng.integers(10, self.served.vocabulary, PROMPT).tolist()
        self._background = self.served.install(BACKGROUND_RANK, DECODING)
        self._decoding: list[str] = []

    def decode(self, rows: int) -> None:
        """From now on ``rows`` rows decode beside what is measured."""
        self.served.engine.abort(self._decoding)
        self.served.make_resident(self._background[:rows])
        self._decoding = [
            self.served.submit(self.prompt, LONGEST, digest) for digest in self._background[:rows]
        ]
        for _ in range(2):
            self.served.step()
        assert len(self.served.engine.scheduler.running) == rows

    def first_token_s(self, digest: str, *, cold: bool) -> float:
        """Seconds from a request for ``digest`` to its first token."""
        if cold:
            assert self.residency.evict(digest)
        else:
            self.served.make_resident([digest])
        start = time.perf_counter()
        request_id = self.served.submit(self.prompt, 1, digest)
        while True:
            done = self.served.step()
            if any(output.request_id == request_id for output in done.outputs):
                return time.perf_counter() - start

    def copy_s(self, digest: str) -> float:
        """Seconds to read the packed file into frames, in this thread."""
        pool = self.served.engine.pool
        packed = self.residency._store.header(digest)
        frames = pool.obtain(self.residency.num_frames(digest), Owner.LOADING)
        assert frames is not None
        start = time.perf_counter()
        self.residency._store.read_into(packed, frames, None)
        seconds = time.perf_counter() - start
        pool.frames.give_back(frames, Owner.LOADING)
        return seconds

    def step_s(self) -> float:
        start = time.perf_counter()
        self.served.step()
        return time.perf_counter() - start

    def steps_with_loads(self, digests: deque[str], loads: int) -> list[float]:
        """Seconds of the steps that run while ``loads`` loads come and go."""
        seconds, landed, asked = [], 0, 0
        while landed < loads:
            if asked < loads and self.residency.num_loading < 2:
                digests.rotate()
                assert self.residency.evict(digests[0])
                assert self.residency.pin(digests[0])  # what nobody waits for is not begun
                asked += 1
            start = time.perf_counter()
            done = self.served.step()
            seconds.append(time.perf_counter() - start)
            for load in done.stats.get("loads", ()):
                self.residency.unpin(load[0])
                landed += 1
        return seconds


def first_tokens(bench: Bench, rank: int, rows: int, pairs: int) -> dict[str, Any]:
    """A case: an adapter of ``rank``, ``rows`` rows decoding beside its first request."""
    digest = bench.served.install(rank, 9, different=9)[8]  # no decoding row's
    bench.decode(rows)
    for cold in (False, True, False):
        bench.first_token_s(digest, cold=cold)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    copies = []
    for pair in range(pairs):
        for cold in (True, False) if pair % 2 == 0 else (False, True):
            seconds[cold].append(bench.first_token_s(digest, cold=cold))
        copies.append(bench.copy_s(digest))
    steps = [bench.step_s() for _ in range(10)] if rows else []
    warm = seconds[False]
    added = [c - w for c, w in zip(seconds[True], warm, strict=True)]
    again = [b - a for a, b in zip(warm, warm[1:], strict=False)]
    return {
        "rank": rank,
        "rows": rows,
        "warm_ms": 1e3 * statistics.median(warm),
        "cold_ms": 1e3 * statistics.median(seconds[True]),
        "copy_ms": 1e3 * statistics.median(copies),
        "step_ms": 1e3 * statistics.median(steps) if steps else None,
        "multiple": throughput.median_interval([a / c for a, c in zip(added, copies, strict=True)]),
        "a_a": throughput.median_interval([a / c for a, c in zip(again, copies, strict=False)]),
    }


def inter_token(bench: Bench, rank: int, blocks: int, steps: int, loads: int) -> dict[str, Any]:
    """Milliseconds between the tokens of 8 warm rows, without loads (twice: A/A) and with."""
    digests = deque(bench.served.install(rank, DECODING + CYCLE)[DECODING:])  # no decoding row's
    bench.decode(DECODING)
    seconds: dict[str, list[float]] = {"alone": [], "again": [], "beside": []}
    for _ in range(blocks):
        seconds["alone"] += [bench.step_s() for _ in range(steps)]
        seconds["beside"] += bench.steps_with_loads(digests, loads)
        seconds["again"] += [bench.step_s() for _ in range(steps)]
    case: dict[str, Any] = {"rank": rank, "loads": blocks * loads}
    for name, values in seconds.items():
        case[f"{name}_p50_ms"], case[f"{name}_p99_ms"] = 1e3 * np.percentile(values, [50, 99])
        case[f"{name}_steps"] = len(values)
    return case


FIRST = {
    "rank": "rank",
    "rows": "decoding rows",
    "warm_ms": "first token, warm, ms",
    "cold_ms": "cold, ms",
    "copy_ms": "copy, ms",
    "step_ms": "step, ms",
    "multiple": "added / copy",
    "a_a": "A/A",
}
BETWEEN = {
    "rank": "rank loaded",
    "loads": "loads",
    "alone_p50_ms": "p50, ms",
    "again_p50_ms": "again (A/A)",
    "beside_p50_ms": "beside loads",
    "alone_p99_ms": "p99, ms",
    "again_p99_ms": "again (A/A)",
    "beside_p99_ms": "beside loads",
}


def draw_plot(found: dict[str, Any], where: Path) -> None:
    with report.plot(where, "cold", panels=2, title="Cold adapters, 135M shape") as (left, right):
        cases = found["first_token"]
        labels = [f"r{c['rank']}\n{c['rows']} rows" for c in cases]
        places = np.arange(len(cases))
        middle, low, high = np.array([c["multiple"] for c in cases]).T
        left.bar(places, middle, yerr=np.maximum(0, [middle - low, high - middle]), width=0.6)
        left.axhline(1.3, color="#444444", linewidth=0.8, linestyle="--")
        left.set_xticks(places, labels)
        left.set_ylabel("added first-token time / copy")
        cases = found["inter_token"]
        places = np.arange(len(cases))
        for shift, name, label in ((-0.2, "alone", "no loads"), (0.2, "beside", "beside loads")):
            p99 = [c[f"{name}_p99_ms"] for c in cases]
            bars = right.bar(places + shift, p99, width=0.36, label=f"p99, {label}")
            p50 = [c[f"{name}_p50_ms"] for c in cases]
            right.bar_label(bars, [f"p50 {value:.0f}" for value in p50], fontsize=7)
        right.set_xticks(places, [f"rank {c['rank']}" for c in cases])
        right.set_ylabel("time between tokens, ms")
        right.margins(y=0.25)
        right.legend(frameon=False, loc="upper left")


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    ranks, pairs, blocks, steps, loads = RANKS, 20, 4, 50, LOADS
    if args.quick:
        ranks, pairs, blocks, steps, loads = (8,), 3, 1, 10, 6
    found = throughput.header()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        found["first_token"] = [
            first_tokens(bench, rank, rows, pairs) for rank in ranks for rows in (0, DECODING)
        ]
        found["inter_token"] = [inter_token(bench, rank, blocks, steps, loads) for rank in ranks]
        bench.served.close()
    where = report.folder(args)
    report.save(found, where, "cold")
    print("\n" + report.markdown(found["first_token"], FIRST))
    print("\n" + report.markdown(found["inter_token"], BETWEEN))
    draw_plot(found, where)


if __name__ == "__main__":
    main()
