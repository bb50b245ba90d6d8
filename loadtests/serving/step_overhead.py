"""The step loop's own time: everything in a decode step but the kernels.

    python loadtests/serving/step_overhead.py [--out FILE]

The decoder and the draw are replaced by constants; scheduling, the arrays a forward pass is given,
commit, prefix hashing and the report are real, on the 135M shape with one adapter per row. CPU
microseconds per step, median over steps, for several batch sizes; the slope is what a row costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import throughput  # beside this file
import torch

from loramux.request import AdapterRef, SamplingParams
from loramux.sampling import sampler
from loramux.wire import Submit

ROWS = (1, 8, 16, 32, 64)
STEPS = 200


def measure(ours: throughput.Ours, rows: int) -> dict[str, float]:
    """Medians over ``STEPS`` decode steps of ``rows`` rows, in microseconds of CPU time."""
    engine = ours.assembled.engine
    for index in range(rows):
        engine.submit(
            Submit(
                request_id=f"{rows}-{index}",
                tenant=f"{rows}-{index}",
                model_id=0,
                adapters=(AdapterRef(ours.digests[index % len(ours.digests)]),),
                prompt_ids=list(range(100)),
                sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=STEPS + 40),
            )
        )
    while len(engine.scheduler.waiting) or any(r.num_pending > 1 for r in engine.scheduler.running):
        engine.step()
    assert len(engine.scheduler.running) == rows
    seconds = []
    phases: dict[str, list[float]] = {}
    for _ in range(STEPS):
        began = time.thread_time()
        done = engine.step()
        seconds.append(time.thread_time() - began)
        for phase, value in done.stats["phase_s"].items():
            phases.setdefault(phase, []).append(value)
    engine.abort([f"{rows}-{index}" for index in range(rows)])
    medians = {phase: 1e6 * float(np.median(values)) for phase, values in phases.items()}
    return {"rows": rows, "total_us": 1e6 * float(np.median(seconds)), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = throughput.write_checkpoint(folder)
        adapters = throughput.write_adapters(folder, base, 32)
        ours = throughput.Ours(base, adapters, folder / "data")
        logits = torch.zeros(512, throughput.SHAPE["vocab_size"])

        def forward(inputs: Any) -> torch.Tensor:
            return logits[: len(inputs.scored)]

        def draw(logits: torch.Tensor, params: Any, position: Any) -> Any:
            return np.full(len(logits), 7), np.zeros(len(logits), bool)

        engine: Any = ours.assembled.engine
        for digest in ours.digests:
            assert engine.residency.load(digest)
            while engine.residency.num_loading:
                engine.residency.poll()
        engine._loop._runner._decoder.forward = forward
        sampler.kernels.draw = draw
        results = [measure(ours, rows) for rows in ROWS]
    slope, intercept = np.polyfit(ROWS, [r["total_us"] for r in results], 1)
    report = {"fixed_us": round(intercept), "per_row_us": round(slope, 1), "steps": results}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
