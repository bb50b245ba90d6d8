"""How a decode step's time grows, beside how it should.

    python loadtests/serving/scaling.py [--quick]

Four sweeps of the 135M shape of ``throughput.py``, each of one quantity with the others fixed:

    rows       1 to 64 rows of one rank-16 adapter, 128 tokens of context each
    adapters   1 to 32 different rank-16 adapters over 32 rows, 128 tokens of context each
    rank       8 rows, each with an adapter of its own, of rank 8 to 128 (the x axis is their sum)
    context    8 rows, each with a rank-16 adapter of its own, 128 to 2,000 tokens each

A point is the median of the engine's own steps. A line is fitted to the points by least squares,
and another to the times predicted for them: for each of base matmuls, LoRA and attention the larger
of its bytes (weights, *different* adapters, keys and values) over the read bandwidth and its
operations over the GEMM rate, both measured at the start. Prompts are not computed: their KV pages
are taken and hold random numbers, which cost a step what true ones would.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import report
import throughput
import torch
from cases import write_base
from workload import Served

from loramux.memory.frames import Owner
from loramux.request import Request

RANKS = (8, 16, 32, 64, 128)
FRAMES = 3200
WARM_UP = 3


@dataclass(frozen=True)
class Point:
    """A decode step of one row for each of ``ranks``; rows of equal rank use the first
    ``adapters`` adapters of it in turn."""

    ranks: tuple[int, ...]
    adapters: int
    context: int

    @property
    def rows(self) -> int:
        return len(self.ranks)

    @property
    def sum_rank(self) -> int:
        """Of the different adapters."""
        return sum(self.ranks[: self.adapters])


def sweeps(quick: bool) -> dict[str, list[tuple[int, Point]]]:
    """By the name of what grows: (its value, the step to measure)."""
    rows = (1, 2, 4, 8, 16, 32, 64)
    adapters = (1, 2, 4, 8, 16, 32)
    contexts = (128, 512, 1000, 1500, 2000)
    if quick:
        rows, adapters, contexts = rows[:4], adapters[:3], contexts[:3]
    most = max(adapters)
    return {
        "rows": [(n, Point((16,) * n, 1, 128)) for n in rows],
        "adapters": [(n, Point((16,) * most, n, 128)) for n in adapters],
        "rank": [(8 * r, Point((r,) * 8, 8, 128)) for r in RANKS[: 3 if quick else None]],
        "context": [(n, Point((16,) * 8, 8, n)) for n in contexts],
    }


def predicted_ms(
    point: Point, shape: Mapping[str, int], widths: Mapping[str, tuple[int, int]], machine: Any
) -> dict[str, float]:
    """What the parts of a step need at least: fp32 weights, adapters, keys and values."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv = widths["k_proj"][1]
    base = layers * sum(a * b for a, b in widths.values()) + shape["vocab_size"] * hidden
    per_rank = layers * sum(a + b for a, b in widths.values())
    keys = point.rows * point.context

    def floor(elements: float, operations: float) -> float:
        read_s = 4 * elements / machine["read_gb_s"] / 1e9
        return 1e3 * max(read_s, operations / machine["gemm_gflops"] / 1e9)

    return {
        "base": floor(base, 2 * point.rows * base),
        "lora": floor(per_rank * point.sum_rank, 2 * per_rank * sum(point.ranks)),
        "attention": floor(layers * 2 * kv * keys, layers * 4 * hidden * keys),
    }


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


class Bench:
    """An engine whose requests begin with their prompt's KV in place."""

    def __init__(self, folder: Path) -> None:
        base = write_base(folder / "base", throughput.SHAPE)
        self._served = Served(base, folder / "data", FRAMES)
        self.widths = self._served.base.widths
        self._digests: dict[int, list[str]] = {}
        # Whatever a page of the arena holds, it must be numbers.
        dtype = getattr(torch, self._served.assembled.ready.dtype)
        self._served.engine.residency._store._arena.data.view(dtype).normal_(std=0.5)

    def step_ms(self, point: Point, steps: int) -> float:
        """Median milliseconds of a step with these rows."""
        served = self._served
        scheduler = served.engine.scheduler
        digests = [self._adapter(rank, i % point.adapters) for i, rank in enumerate(point.ranks)]
        served.hold_only(digests)
        # Half the steps before and half after the context that is asked for.
        prompt = [100] * (point.context - (WARM_UP + steps) // 2)

        def in_place(request: Request) -> int:
            frames = served.engine.pool.obtain(
                -(-request.num_ids // served.assembled.ready.page_tokens), Owner.KV
            )
            assert frames is not None
            request.kv.add_frames(frames)
            request.kv.num_computed = request.num_ids - 1
            return 0

        with mock.patch.object(scheduler, "_take_cached_pages", in_place):
            names = [served.submit(prompt, WARM_UP + steps + 1, digest) for digest in digests]
            for _ in range(WARM_UP):
                served.step()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            done = served.step()
            seconds.append(time.perf_counter() - start)
            assert done.stats["batch_rows"] == done.stats["batch_tokens"] == point.rows
            assert done.stats["batch_adapters"] == point.adapters
        served.engine.abort(names)
        return 1e3 * statistics.median(seconds)

    def _adapter(self, rank: int, index: int) -> str:
        if rank not in self._digests:
            self._digests[rank] = self._served.install(rank, 32, different=2)
        return self._digests[rank][index]

    def close(self) -> None:
        self._served.close()


def sweep_case(
    name: str, points: list[tuple[int, Point]], bench: Bench, machine: Any, steps: int, turns: int
) -> dict[str, Any]:
    """Measured and predicted milliseconds of one sweep, and the lines through them."""
    measured: dict[int, list[float]] = {x: [] for x, _ in points}
    for turn in range(turns):
        for x, point in points if turn % 2 == 0 else reversed(points):
            measured[x].append(bench.step_ms(point, steps))
    xs = [x for x, _ in points]
    ms = [statistics.median(measured[x]) for x in xs]
    floors = [
        sum(predicted_ms(p, throughput.SHAPE, bench.widths, machine).values()) for _, p in points
    ]
    slope, intercept = line(xs, ms)
    floor_slope, floor_intercept = line(xs, floors)
    return {
        "sweep": name,
        "x": xs,
        "ms": ms,
        "predicted_ms": floors,
        "slope_us": 1e3 * slope,
        "predicted_slope_us": 1e3 * floor_slope,
        "ratio": slope / floor_slope,
        "intercept_ms": intercept,
        "predicted_intercept_ms": floor_intercept,
    }


UNITS = {
    "rows": "a row",
    "adapters": "an adapter of rank 16",
    "rank": "a rank, of all adapters' sum",
    "context": "a token of context, in each of 8 rows",
}
AXES = {
    "rows": "rows of one adapter",
    "adapters": "different adapters of rank 16 in 32 rows",
    "rank": "sum of the ranks of 8 adapters",
    "context": "tokens of context in each of 8 rows",
}
COLUMNS = {
    "unit": "one more",
    "slope_us": "µs, measured",
    "predicted_slope_us": "predicted",
    "ratio": "measured / predicted",
    "intercept_ms": "at none: ms",
    "predicted_intercept_ms": "predicted",
}


def draw_plot(cases: list[dict[str, Any]], where: Path) -> None:
    with report.plot(where, "scaling", panels=4, title="A decode step, 135M shape") as axes:
        for axis, case in zip(axes, cases, strict=True):
            x = np.array(case["x"])
            for prefix, label in (("", "measured"), ("predicted_", "predicted")):
                (dots,) = axis.plot(x, case[f"{prefix}ms"], "o", label=label)
                slope, intercept = case[f"{prefix}slope_us"] / 1e3, case[f"{prefix}intercept_ms"]
                axis.plot(x, intercept + slope * x, linewidth=1, color=dots.get_color())
            axis.set(xlabel=AXES[case["sweep"]], ylabel="step, ms")
            axis.set_ylim(bottom=0)
        axes[0].legend(frameon=False)


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    steps, turns = (8, 1) if args.quick else (20, 4)
    found = throughput.header()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        for name, points in sweeps(args.quick).items():
            case = sweep_case(name, points, bench, found["machine"], steps, turns)
            found["cases"].append(case | {"unit": UNITS[name]})
            print(f"{name}: {[round(ms, 1) for ms in case['ms']]}", flush=True)
        bench.close()
    where = report.folder(args)
    report.save(found, where, "scaling")
    print("\n" + report.markdown(found["cases"], COLUMNS))
    draw_plot(found["cases"], where)


if __name__ == "__main__":
    main()
