"""Memory that runs out anywhere in a step costs time, and tokens of nobody."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.harness import Harness

from loramux.batch import Batch
from loramux.engine.limits import CALM_STEPS, StepRoom
from loramux.memory.shortage import is_shortage
from loramux.request import DRAFT_MODEL_ID, Speculation

GOOD = [[5, 6, 7, 8] * 5, [9] * 20, [11, 12, 13], list(range(5, 65))]
OUT = torch.OutOfMemoryError("as planned")
STICKY = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("shortage") / "model")


class Short:
    """``error`` at one place of every step whose batch is ``too_much``."""

    def __init__(
        self, harness: Harness, place: str, too_much: Callable[[Batch], bool], error: Exception
    ) -> None:
        self.too_much, self.error, self.place = too_much, error, place
        self.times = 0
        loop: Any = harness.engine._loop
        self.plan_, self.forward_ = loop._runner.plan, loop._runner.forward
        self.start_ = loop._sampler.start
        loop._runner.plan, loop._runner.forward = self.plan, self.forward
        loop._sampler.start = self.start

    def check(self, place: str, batch: Batch) -> None:
        if place == self.place and self.too_much(batch):
            self.times += 1
            raise self.error

    def plan(self, batch: Batch) -> Any:
        self.check("plan", batch)
        return self.plan_(batch)

    def forward(self, plan: Any) -> Any:
        self.batch = plan.batch
        self.check("forward", self.batch)
        return self.forward_(plan)

    def start(self, *arguments: Any) -> Any:
        self.check("sample", self.batch)
        batch, wait = self.batch, self.start_(*arguments)

        def result() -> Any:
            self.check("result", batch)
            return wait()

        return result


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("place", ["plan", "forward", "sample", "result"])
def test_what_is_too_large_is_computed_in_smaller_steps(
    model: Path, overlap: bool, place: str
) -> None:
    knobs: dict[str, Any] = {"temperature": 0.7, "logprobs": 1, "prompt_logprobs": 0}
    harness = Harness(model, overlap=overlap)
    alone = [harness.submit(prompt, tenant="alone", **knobs) for prompt in GOOD]
    harness.run()
    short = Short(harness, place, lambda batch: batch.num_tokens > 3, OUT)
    names = [harness.submit(prompt, tenant="together", **knobs) for prompt in GOOD]
    harness.run()
    assert not harness.failed and short.times >= 3
    for name, expected in zip(names, alone, strict=True):
        assert harness.outputs[name] == harness.outputs[expected]
        bits = [[o.logprobs for o in harness.details[each]] for each in (name, expected)]
        assert bits[0] == bits[1]
        prompts = [harness.details[each][0].prompt_logprobs for each in (name, expected)]
        assert prompts[0] == prompts[1]
    shortages = [done for done in harness.steps if done.stats.get("shortages")]
    assert sum(done.stats["shortages"] for done in shortages) == short.times
    assert all(done.moved for done in shortages), "or the engine would sleep"
    harness.close()


@pytest.mark.parametrize("place", ["forward", "result"])
@pytest.mark.parametrize("overlap", [False, True])
def test_who_finds_none_alone_fails_and_the_others_go_on(
    model: Path, place: str, overlap: bool
) -> None:
    harness = Harness(model, overlap=overlap)
    expected = [harness.generate(prompt, tenant="alone") for prompt in GOOD]
    bad = "bad"
    Short(harness, place, lambda batch: any(r.request.id == bad for r in batch.rows), OUT)
    names = [harness.submit(prompt, tenant="together") for prompt in GOOD[:2]]
    harness.submit([40, 41, 42], name=bad)
    names += [harness.submit(prompt, tenant="together") for prompt in GOOD[2:]]
    harness.run()
    assert list(harness.failed) == [bad] and harness.failed[bad].code == "overloaded"
    assert [harness.outputs[name] for name in names] == expected
    harness.close()


@pytest.mark.parametrize("place", ["plan", "forward", "sample", "result"])
def test_what_a_device_keeps_ends_the_engine(model: Path, place: str) -> None:
    harness = Harness(model)
    Short(harness, place, lambda batch: True, STICKY)
    harness.submit(GOOD[0])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        harness.run()
    harness.close()


@pytest.mark.parametrize("error", [OUT, STICKY])
def test_without_memory_to_guess_the_steps_are_plain(model: Path, error: Exception) -> None:
    """Nothing is held for the guesses that came to nothing: the harness counts after every step."""
    harness = Harness(model, draft_model=model)
    expected = [harness.generate(prompt, max_tokens=100) for prompt in GOOD]
    runner = harness.engine.partners[DRAFT_MODEL_ID].runner
    forward, asked = runner.forward, []

    def fails(plan: Any) -> Any:
        asked.append(len(harness.steps))
        if len(asked) == 2:
            raise error
        return forward(plan)

    runner.forward = fails  # type: ignore[method-assign]
    wish = Speculation(drafters=("draft",), max_draft_tokens=2)
    names = [harness.submit(prompt, max_tokens=100, speculation=wish) for prompt in GOOD]
    if error is STICKY:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            harness.run()
        return
    harness.run()
    assert not harness.failed and [harness.outputs[name] for name in names] == expected
    assert len(asked) > 3 and asked[2] - asked[1] == CALM_STEPS, "not asked again at once"
    harness.close()


def test_a_state_that_cannot_be_kept_costs_guesses_only(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(model)
    expected = [harness.generate(prompt) for prompt in GOOD]
    drafting = harness.engine.drafting

    def saw(*_: Any) -> None:
        raise OUT

    monkeypatch.setattr(drafting, "reads", lambda request: True)
    monkeypatch.setattr(drafting, "saw", saw)
    names = [harness.submit(prompt) for prompt in GOOD]
    harness.run()
    assert [harness.outputs[name] for name in names] == expected
    harness.close()


def test_room_comes_back_when_memory_does() -> None:
    room = StepRoom(100)
    room.too_large(90)
    assert room.tokens == 45
    room.too_large(100)
    assert room.tokens == 45, "of two batches of a step the smaller counts"
    seen = []
    for _ in range(3 * CALM_STEPS):
        room.stepped()
        seen.append(room.tokens)
    assert seen == [45] * (CALM_STEPS - 1) + [90] * CALM_STEPS + [100] * (CALM_STEPS + 1)
    room.too_large(1)
    assert room.tokens == 1
    room.no_guesses()
    for _ in range(CALM_STEPS):
        assert not room.guesses
        room.stepped()
    assert room.guesses


def test_a_shortage_is_told_from_what_is_broken() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (
        real.value,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        assert is_shortage(error), error
    for error in (
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        OSError(errno.EIO, "Input/output error"),
        ValueError("out of memory"),
    ):
        assert not is_shortage(error), error
