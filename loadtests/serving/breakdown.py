"""Where a decode step's time goes, beside the floor of each part.

    python loadtests/serving/breakdown.py [--cases 1,8,32] [--out docs/results/x.json]

The model, adapters and requests are those of ``throughput.py``. A decode step has one row per
request, each with its own rank-16 adapter. The floor of a part is the larger of its bytes (weights,
distinct adapters, keys and values) over the measured read bandwidth and its operations over the
measured GEMM rate. Parts are timed with the operations called one by one; "whole step" is the
engine's own step, in which they are one compiled call, and "bare" the same step without adapters:
what is between them is what adapters cost as they are served. The two are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import throughput
from throughput import RANK, SHAPE, Ours

from loramux.engine.engine import Engine
from loramux.model import decoder as decoder_module

PARTS = (
    "project",
    "add_lora",
    "paged_attention",
    "rope_store",
    "add_rms_norm",
    "silu_mul",
    "gather",
)
PROMPT, NEW = 96, 48


def floors(rows: int, context: float, machine: dict[str, Any]) -> dict[str, float]:
    """Milliseconds that the parts of a step need at least."""
    hidden, inner, layers = (
        SHAPE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    kv = SHAPE["num_key_value_heads"] * (hidden // SHAPE["num_attention_heads"])
    outs = {"qkv": hidden + 2 * kv, "o": hidden, "gate_up": 2 * inner, "down": hidden}
    ins = {"qkv": hidden, "o": hidden, "gate_up": hidden, "down": inner}
    matrices = layers * sum(outs[s] * ins[s] for s in outs)
    head = SHAPE["vocab_size"] * hidden
    modules = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    adapter = layers * RANK * sum(outs[s] + modules[s] * ins[s] for s in outs)

    def floor(elements: float, operations: float) -> float:
        read = 4 * elements / machine["read_gb_s"] / 1e9
        return 1e3 * max(read, operations / machine["gemm_gflops"] / 1e9)

    return {
        "project": floor(matrices + head, 2 * rows * (matrices + head)),
        "add_lora": floor(rows * adapter, 2 * rows * adapter),
        "paged_attention": floor(
            rows * layers * 2 * kv * context, rows * layers * 4 * hidden * context
        ),
    }


class Clock:
    """Wall-clock milliseconds of the decode steps of a run, and of the parts of each."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self.steps: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._rows = rows
        self._now: dict[str, float] = defaultdict(float)
        self._step = engine.step

    def step(self) -> Any:
        self._now = defaultdict(float)
        start = time.perf_counter()
        done = self._step()
        took = time.perf_counter() - start
        if done.stats["batch_rows"] == done.stats["batch_tokens"] == self._rows:
            self.steps.append(1e3 * took)
            self.parts.append(self._now)
        return done

    def around(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            function(*args, **kwargs)
            self._now[name] += 1e3 * (time.perf_counter() - start)

        return call


def run_timed(
    ours: Ours, jobs: list[throughput.Job], *, one_by_one: bool = False, adapters: bool = True
) -> Clock:
    engine = ours.assembled.engine
    clock = Clock(engine, len(jobs))
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(engine, "step", clock.step))
        if one_by_one:
            patched.enter_context(mock.patch.object(decoder_module, "backend", lambda _: "each"))
            for name in PARTS:
                wrapped = clock.around(name, getattr(decoder_module, name))
                patched.enter_context(mock.patch.object(decoder_module, name, wrapped))
        ours.run(jobs, with_adapters=adapters)
    return clock


def breakdown(ours: Ours, num: int, machine: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(num)
    vocabulary = SHAPE["vocab_size"]
    jobs = [
        throughput.Job(i, rng.integers(10, vocabulary, PROMPT).tolist(), NEW) for i in range(num)
    ]
    ours.run(jobs, with_adapters=True)
    whole: list[float] = []
    bare: list[float] = []
    for adapters in (True, False, False, True) * 2:
        (whole if adapters else bare).extend(run_timed(ours, jobs, adapters=adapters).steps)
    apart = run_timed(ours, jobs, one_by_one=True)
    median = statistics.median
    return {
        "rows": num,
        "whole_step_ms": round(median(whole), 2),
        "bare_step_ms": round(median(bare), 2),
        "one_by_one_ms": round(median(apart.steps), 2),
        "parts_ms": {n: round(median(p[n] for p in apart.parts), 2) for n in PARTS},
        "floors_ms": {n: round(ms, 2) for n, ms in floors(num, PROMPT + NEW / 2, machine).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="1,8,32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [int(case) for case in args.cases.split(",")]
    report = throughput.header()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = throughput.write_checkpoint(folder)
        ours = Ours(base, throughput.write_adapters(folder, base, max(cases)), folder / "data")
        for case in cases:
            report["cases"].append(breakdown(ours, case, report["machine"]))
            print(json.dumps(report["cases"][-1]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
