"""How long this model takes on this machine for a step, by its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

from loramux.batch import Batch, Row
from loramux.model.runner import ModelRunner
from loramux.request import BASE_MODEL_ID, Request, SamplingParams
from loramux.sampling.sampler import Sampler
from loramux.speculation.costs import Costs, measure

ROW_TOKENS = 8
"""Of a request that guesses, about."""
CPU_LARGEST = 128
"""By then a CPU takes as much for a token as it ever will, and logits are wide."""


def measure_costs(
    runner: ModelRunner,
    sampler: Sampler,
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Time forward passes and draws of up to ``most`` tokens, at the beginning of a context: what
    attention to a longer one takes is not in it, nor what adapters do. It writes to the pool's
    first frame alone, which nobody may own yet."""
    sampling = SamplingParams(seed=0, max_tokens=ROW_TOKENS)
    request = Request("costs", prompt_ids=[0], sampling=sampling)
    request.ids[:] = 0
    request.kv.reserve(ROW_TOKENS)
    request.kv.add_frames([0] * ROW_TOKENS)
    sampler.add(request.id, sampling, [0], ())

    def step(counts: list[int]) -> None:
        rows = [Row(request, 1) for _ in counts]
        for row, count in zip(rows, counts, strict=True):
            row.drafts, row.num_tokens = [0] * (count - 1), count
        logits = runner.forward(runner.plan(Batch.of(BASE_MODEL_ID, rows))).logits
        sampler.sample(logits, [(request.id, 0)] * sum(counts))

    def mixed(tokens: int) -> None:
        whole, rest = divmod(tokens, ROW_TOKENS)
        step([ROW_TOKENS] * whole + [rest] * (rest > 0))

    if sampler.device.type == "cpu":
        costs = Costs.alike(measure(mixed, most, clock, largest=CPU_LARGEST))
    else:
        plain = measure(lambda tokens: step([1] * tokens), most, clock)
        costs = Costs(plain, measure(mixed, most, clock))
    sampler.remove(request.id)
    return costs
