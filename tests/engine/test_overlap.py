"""A step is planned while the one before it is on its way, and nobody can tell from the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from tests import tiny
from tests.harness import Harness

from loramux.engine.blackbox import BlackBox
from loramux.engine.engine import Engine
from loramux.engine.main import EngineProcess
from loramux.model.runner import Plan, Scored
from loramux.sampling.sampler import SampleResult
from loramux.wire import StepDone

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("engine") / "base")


def served(harness: Harness, requests: list[dict[str, Any]]) -> list[tuple[list[int], Any]]:
    """All of ``requests`` together: tokens and log-probabilities, and how each ended."""
    names = [
        harness.submit(prompt, **knobs) for prompt, knobs in zip(PROMPTS, requests, strict=False)
    ]
    harness.run()
    answers = []
    for name in names:
        pieces = [(o.start_index, o.logprobs, o.prompt_logprobs) for o in harness.details[name]]
        end = harness.finished[name]
        answers.append((harness.outputs[name], (pieces, end.reason, end.stop_token_id)))
    return answers


def rows_computed(harness: Harness) -> int:
    return sum(step.stats.get("batch_tokens", 0) for step in harness.steps)


def test_the_next_step_is_planned_before_the_tokens_are_waited_for(model: Path) -> None:
    """And launched after: what happens between two launches is one wait and one commit."""
    harness = Harness(model, overlap=True)
    seen: list[str] = []
    loop = harness.engine._loop
    plan, forward, start = loop._runner.plan, loop._runner.forward, loop._sampler.start

    def planned(batch: Any) -> Plan:
        seen.append("plan")
        return plan(batch)

    def launched(made: Plan) -> Scored:
        seen.append("launch")
        return forward(made)

    def started(*args: Any) -> Callable[[], SampleResult]:
        result = start(*args)

        def waited() -> SampleResult:
            seen.append("wait")
            return result()

        return waited

    loop._runner.plan, loop._runner.forward = planned, launched  # type: ignore[method-assign]
    loop._sampler.start = started  # type: ignore[method-assign]
    served(harness, [{"max_tokens": 4}] * 3)
    assert seen == ["plan", "launch", *["plan", "wait", "launch"] * 3, "wait"]
    harness.close()


def test_a_row_that_ends_is_taken_out_of_the_plan(model: Path) -> None:
    """With stop tokens the end comes as a surprise: still no row is computed in vain."""
    plain, overlapped = Harness(model), Harness(model, overlap=True)
    (long, *_), *_ = served(plain, [{"max_tokens": 12}])
    requests = [{"max_tokens": 12, "stop_token_ids": (long[3],)}] + [{"max_tokens": 12}] * 3
    before = rows_computed(plain)
    expected = served(plain, requests)
    assert expected[0][1][1:] == ("stop", long[3])
    assert served(overlapped, requests) == expected
    assert rows_computed(overlapped) == rows_computed(plain) - before
    plain.close()
    overlapped.close()


def test_log_probabilities_penalties_and_prompts_alone_are_the_same(model: Path) -> None:
    requests: list[dict[str, Any]] = [
        {"logprobs": 2, "temperature": 1.0, "seed": 3},
        {"prompt_logprobs": 1, "max_tokens": 0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "max_tokens": 10},
        {"prompt_logprobs": 0, "logprobs": 0, "max_tokens": 1},
        {"min_tokens": 3, "stop_token_ids": tuple(range(0, tiny.VOCAB_SIZE, 2)), "max_tokens": 9},
    ]
    plain, overlapped = Harness(model), Harness(model, overlap=True)
    assert served(overlapped, requests) == served(plain, requests)
    plain.close()
    overlapped.close()


def test_who_leaves_while_a_step_is_on_its_way_gets_nothing_more(model: Path) -> None:
    harness = Harness(model, overlap=True)
    expected = harness.generate(PROMPTS[0], max_tokens=8)
    left = harness.submit(PROMPTS[1], max_tokens=8)
    stays = harness.submit(PROMPTS[0], max_tokens=8)
    for _ in range(3):
        harness.step()
    told = list(harness.outputs[left])
    harness.engine.abort([left])
    harness.run()
    assert harness.outputs[left] == told
    assert harness.outputs[stays] == expected
    harness.close()


def test_the_last_to_leave_is_no_burden_for_the_next(model: Path) -> None:
    harness = Harness(model, overlap=True)
    expected = harness.generate(PROMPTS[0], max_tokens=5)
    left = harness.submit(PROMPTS[1], max_tokens=8)
    harness.step()
    harness.engine.abort([left])
    assert not harness.engine.has_work
    assert harness.generate(PROMPTS[0], max_tokens=5) == expected
    assert harness.outputs[left] == []
    harness.close()


def test_a_broken_row_fails_its_request_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(model, overlap=True)
    expected = harness.generate(PROMPTS[0], max_tokens=6)
    decoder = harness.engine._loop._runner._decoder
    forward = decoder.forward

    def poisoned(inputs: Any) -> torch.Tensor:
        logits = forward(inputs)
        if len(logits) == 2 and int(np.max(inputs.positions.numpy())) == 6:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(decoder, "forward", poisoned)
    good = harness.submit(PROMPTS[0], max_tokens=6)
    bad = harness.submit(PROMPTS[1], max_tokens=6)
    harness.run()
    assert harness.failed[bad].code == "numerical_error"
    assert harness.outputs[good] == expected
    harness.close()


def test_the_process_does_not_sleep_while_a_request_waits(model: Path, tmp_path: Path) -> None:
    """A step that launched nothing may have ended a request whose place the next one takes."""
    harness = Harness(model, overlap=True, max_num_seqs=1)
    loop = harness.engine._loop
    start = loop._sampler.start

    def broken_for_the_first(*args: Any) -> Callable[[], SampleResult]:
        wait = start(*args)

        def result() -> SampleResult:
            sampled = wait()
            sampled.bad[:] = not process.told
            return sampled

        return result

    loop._sampler.start = broken_for_the_first  # type: ignore[method-assign]
    names = [harness.submit(prompt, max_tokens=2) for prompt in PROMPTS[:2]]
    process = Listening(harness.engine, tmp_path / "steps")
    with pytest.raises(StopIteration):
        process.run()
    assert [failed.request_id for failed in process.told[0].failed] == names[:1]
    assert [end.request_id for end in process.told[-1].finished] == names[1:]
    assert len(process.slept) == 1, "only before the first step"
    process._inbox.close()
    harness.close()


class Listening(EngineProcess):
    """The engine's process without a front: what it says, and how it slept until all had ended."""

    def __init__(self, engine: Engine, box: Path) -> None:
        inbox = zmq.Context.instance().socket(zmq.PAIR)
        super().__init__(engine, inbox, epoch=1, box=BlackBox(box, 1))
        self.told: list[StepDone] = []
        self.slept: list[float] = []

    def _tell(self, done: StepDone) -> None:
        if done.failed or done.finished:
            self.told.append(done)

    def _receive(self, wait_s: float) -> None:
        if not self._engine.has_work:
            raise StopIteration
        if wait_s:
            self.slept.append(wait_s)
