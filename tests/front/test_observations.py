"""Totals add up, and nothing in them grows with the number of adapters."""

from __future__ import annotations

import pytest
from tests.front.house import spec

from loramux.front.generation import Done
from loramux.front.observations import Observations
from loramux.metrics.stats import AdapterLoad, StepStats
from loramux.request import AdapterRef


def done(num_output_tokens: int) -> Done:
    return Done(
        finish_reason="length",
        stop_reason=None,
        num_output_tokens=num_output_tokens,
        cached_tokens=0,
        queue_s=0,
        prefill_s=0,
        first_token_at=None,
        finished_at=0,
    )


def test_steps_add_up_and_survive_an_engine() -> None:
    observations = Observations()
    stats = StepStats(
        prompt_tokens=3,
        generation_tokens=2,
        prefix_queries=5,
        prefix_hits=4,
        preemptions=1,
        loads=[AdapterLoad("a", 0.5, 10), AdapterLoad("b", 0.25, 20)],
        evictions={"lru": 2},
        resident=["a", "b"],
        pinned=["a"],
        waiting_adapters=["c"],
        phase_s={"forward": 0.5},
    )
    observations.engine_started(1)
    observations.step(stats)
    observations.step(StepStats(prompt_tokens=1, phase_s={"forward": 0.25, "sample": 1}))
    snapshot = observations.snapshot
    assert (snapshot.steps, snapshot.prompt_tokens, snapshot.generation_tokens) == (2, 4, 2)
    assert (snapshot.prefix_queries, snapshot.prefix_hits, snapshot.preemptions) == (5, 4, 1)
    assert (snapshot.adapter_loads, snapshot.adapter_load_bytes) == (2, 30)
    assert snapshot.adapter_load_s == 0.75 and snapshot.evictions == {"lru": 2}
    assert snapshot.phase_s == {"forward": 0.75, "sample": 1}
    assert (snapshot.resident, snapshot.pinned) == ({"a", "b"}, {"a"})
    assert snapshot.waiting_adapters == ("c",)
    observations.engine_started(2)
    assert snapshot.resident == snapshot.pinned == frozenset() and snapshot.prompt_tokens == 4


def test_tokens_by_adapter_are_bounded() -> None:
    observations = Observations()
    for number in range(1005):
        one = spec(adapters=(AdapterRef(f"{number:064x}"),))
        observations.submitted(one)
        observations.finished(one, done(2))
    tokens = observations.snapshot.adapter_tokens
    assert len(tokens) == 1001 and tokens["other"] == [25, 10]
    assert sum(prompt for prompt, _ in tokens.values()) == 5 * 1005
    assert observations.snapshot.unfinished == 0


def test_recent_loads_are_bounded_and_the_newest_stay() -> None:
    observations = Observations()
    for number in range(1100):
        observations.step(StepStats(loads=[AdapterLoad(f"{number % 1050}", 0.5, 10)]))
    loads = observations.snapshot.recent_loads
    assert len(loads) == 1000 and list(loads)[-1] == "49" and "99" not in loads
    assert all(ended - began == pytest.approx(0.5) for began, ended in loads.values())
