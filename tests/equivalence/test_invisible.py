"""No optimisation can be seen: tokens depend on the request alone.

Every test compares with the request served alone by an engine with other page and chunk sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.harness import Harness

Job = tuple[list[int], str | None, dict[str, Any]]
SLACK = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "choice": 2, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.3, "seed": 7, "top_k": 20, "presence_penalty": 0.5, "logit_bias": {9: 3.0}},
]


def jobs(adapters: dict[str, Path], num: int, seed: int) -> list[Job]:
    """Requests that share prompt beginnings, adapters and seeds here and there."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(4, tiny.VOCAB_SIZE, 40).tolist()
    names = [None, *adapters]
    made: list[Job] = []
    for _ in range(num):
        prompt = stem[: rng.integers(1, 40)]
        prompt += rng.integers(4, tiny.VOCAB_SIZE, rng.integers(0, 4)).tolist()
        knobs = {"max_tokens": int(rng.integers(1, 14)), **SAMPLINGS[rng.integers(len(SAMPLINGS))]}
        made.append((prompt, names[rng.integers(len(names))], knobs))
    return made


@pytest.fixture(scope="module")
def alone(llama: Path, adapters: dict[str, Path]) -> Any:
    """What a request answers when nobody else is there, remembered."""
    harness = Harness(llama, page_tokens=8, prefix_caching=False, check=False)
    known: dict[str, list[int]] = {}

    def answer(job: Job) -> list[int]:
        prompt, name, knobs = job
        key = repr(job)
        if key not in known:
            adapter = None if name is None else adapters[name]
            known[key] = harness.generate(prompt, adapter, **knobs)
        return known[key]

    yield answer
    harness.close()


def compare(harness: Harness, adapters: dict[str, Path], batch: list[Job], alone: Any) -> None:
    """Serve ``batch`` together, joining in at different steps, and compare each with alone."""
    names = []
    for index, (prompt, name, knobs) in enumerate(batch):
        adapter = None if name is None else adapters[name]
        names.append(harness.submit(prompt, adapter, **knobs))
        if index % 3 == 2:
            harness.step()
    outputs = harness.run()
    for request_id, job in zip(names, batch, strict=True):
        assert request_id not in harness.failed, harness.failed[request_id]
        assert outputs[request_id] == alone(job), job
    harness.close()


@OVERLAP
@SLACK
@given(seed=st.integers(0, 10**6), page=st.sampled_from([4, 8, 16]), chunk=st.integers(16, 40))
def test_neighbours_pages_and_chunks(
    llama: Path,
    adapters: dict[str, Path],
    alone: Any,
    overlap: bool,
    seed: int,
    page: int,
    chunk: int,
) -> None:
    harness = Harness(llama, page_tokens=page, max_batch_tokens=chunk, overlap=overlap)
    compare(harness, adapters, jobs(adapters, 7, seed), alone)


@SLACK
@given(seed=st.integers(0, 10**6))
def test_prefix_hits(llama: Path, adapters: dict[str, Path], alone: Any, seed: int) -> None:
    harness = Harness(llama, page_tokens=4)
    batch = jobs(adapters, 6, seed)
    for prompt, name, knobs in batch:
        harness.submit(prompt, None if name is None else adapters[name], **knobs)
    harness.run()
    before = sum(step.stats.get("prefix_hits", 0) for step in harness.steps)
    compare(harness, adapters, batch, alone)
    assert sum(step.stats.get("prefix_hits", 0) for step in harness.steps) >= before


@OVERLAP
@SLACK
@given(data=st.data())
def test_preemption_at_any_step(
    llama: Path, adapters: dict[str, Path], alone: Any, overlap: bool, data: st.DataObject
) -> None:
    harness = Harness(llama, page_tokens=4, overlap=overlap)
    batch = jobs(adapters, 6, data.draw(st.integers(0, 10**6)))
    names = [
        harness.submit(prompt, None if name is None else adapters[name], **knobs)
        for prompt, name, knobs in batch
    ]
    when = data.draw(st.lists(st.integers(0, 12), max_size=6))
    for step in range(13):
        harness.step()
        running = harness.engine.scheduler.running
        for _ in range(when.count(step)):
            if running:
                victim = running[data.draw(st.integers(0, len(running) - 1))]
                harness.engine.scheduler._preempt(victim)
    outputs = harness.run()
    for request_id, job in zip(names, batch, strict=True):
        assert outputs[request_id] == alone(job), job
    harness.close()


@OVERLAP
@SLACK
@given(seed=st.integers(0, 10**6), spare=st.integers(0, 12))
def test_eviction_and_reload_in_a_pool_that_is_too_small(
    llama: Path, adapters: dict[str, Path], alone: Any, overlap: bool, seed: int, spare: int
) -> None:
    batch = jobs(adapters, 10, seed)
    probe = Harness(llama, page_tokens=8, num_frames=4000)
    sizes = [probe.engine.residency.num_frames(probe.install(path)) for path in adapters.values()]
    probe.close()
    frames = max(sizes) + 8 + spare
    harness = Harness(llama, page_tokens=8, num_frames=frames, overlap=overlap)
    compare(harness, adapters, batch, alone)


def test_a_request_goes_on_from_what_it_had_said(
    llama: Path, adapters: dict[str, Path], alone: Any
) -> None:
    for job in jobs(adapters, 8, seed=11):
        prompt, name, knobs = job
        whole = alone(job)
        harness = Harness(llama)
        for cut in {0, 1, len(whole) // 2, max(len(whole) - 1, 0)}:
            if cut < len(whole):
                adapter = None if name is None else adapters[name]
                rest = harness.submit(prompt, adapter, output_ids=whole[:cut], **knobs)
                assert harness.run()[rest] == whole
        harness.close()


def test_choices_of_one_seed_differ_and_repeat(llama: Path) -> None:
    harness = Harness(llama)
    prompt = [5, 6, 7, 8]
    knobs = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    first = [harness.generate(prompt, choice=choice, **knobs) for choice in range(4)]
    again = [harness.generate(prompt, choice=choice, **knobs) for choice in range(4)]
    assert first == again
    assert len({tuple(ids) for ids in first}) == 4
    harness.close()
