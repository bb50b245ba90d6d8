"""Time is up: wherever a request is then, on a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import tiny
from tests.harness import Harness

from loramux.memory.frames import Owner
from loramux.wire import StepDone

PROMPT = list(range(5, 45))


class Timed(Harness):
    """An engine whose clock stands still between moves, with steps as long as it is told."""

    def __init__(self, model: Path, **config: object) -> None:
        settings = {"prefix_caching": False, **config}
        super().__init__(model, max_batch_tokens=16, max_num_seqs=1, **settings)
        self.now, self.step_s = 1000.0, 0.0
        clock = lambda: self.now  # noqa: E731
        self.engine._clock = self.engine._loop._clock = self.engine.scheduler._clock = clock

    def steps_take(self, seconds: float) -> None:
        self.engine.scheduler.deadlines.step_s = self.step_s = seconds

    def step(self) -> StepDone:
        done = super().step()
        self.steps_take(self.step_s)
        return done


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("deadlines") / "base")


@pytest.fixture(scope="module")
def timed(model: Path) -> Iterator[Timed]:
    harness = Timed(model)
    yield harness
    harness.close()


@pytest.mark.parametrize("steps", [0, 1, 3, 6], ids=["queue", "prefill", "first token", "decode"])
def test_a_deadline_ends_a_request_wherever_it_is(timed: Timed, steps: int) -> None:
    busy = timed.submit(PROMPT, max_tokens=4) if steps == 0 else None
    if busy:
        timed.step()
    name = timed.submit(PROMPT, max_tokens=50, deadline_s=10)
    for _ in range(steps):
        timed.step()
    timed.now += 9.9
    timed.step()
    assert name not in timed.failed
    before = len(timed.outputs[name])
    assert (before > 0) == (steps > 1)
    timed.now += 0.2
    timed.step()
    assert timed.failed[name].code == "deadline_exceeded" and len(timed.outputs[name]) == before
    timed.run()
    if busy:
        assert len(timed.outputs[busy]) == 4
    assert timed.engine.pool.frames.count(Owner.KV) == 0


def test_without_an_slo_one_waits(timed: Timed) -> None:
    first, second = (timed.submit(PROMPT, max_tokens=4) for _ in range(2))
    timed.step()
    timed.now += 10**6
    timed.run()
    assert {first, second} <= timed.finished.keys()


def test_who_cannot_make_its_first_token_is_refused_while_it_waits(model: Path) -> None:
    """A prompt of three steps of two seconds has to begin six seconds before."""
    timed = Timed(model, first_token_slo_s=10)
    timed.steps_take(2.0)
    running = timed.submit(PROMPT, max_tokens=30)
    timed.step()
    long, short = timed.submit(PROMPT), timed.submit(PROMPT[:10])
    again = timed.submit(PROMPT, output_ids=[7, 8])  # that of an engine before: begun long ago
    timed.now += 3.9
    timed.step()
    assert not timed.failed
    timed.now += 0.2
    timed.step()
    assert timed.failed.keys() == {long} and timed.failed[long].code == "overloaded"
    timed.now += 4
    timed.step()
    assert timed.failed.keys() == {long, short}
    timed.run()
    assert timed.finished.keys() == {running, again}, "who has begun is let go on"
    timed.close()


def test_a_prefill_that_has_begun_is_let_go_on(model: Path) -> None:
    timed = Timed(model, first_token_slo_s=10)
    name = timed.submit(PROMPT)
    timed.step()
    timed.now += 100
    timed.run()
    assert name in timed.finished
    timed.close()


def test_what_is_cached_costs_no_time(model: Path) -> None:
    """Of a prompt of three steps all but the end is there: its first token is one step away."""
    timed = Timed(model, first_token_slo_s=10, prefix_caching=True)
    timed.generate(PROMPT)
    timed.submit(PROMPT[::-1])
    timed.step()
    timed.steps_take(4.0)
    cached, other = timed.submit(PROMPT), timed.submit([50, *PROMPT])
    timed.step()
    assert timed.failed.keys() == {other}
    timed.run()
    assert timed.finished.keys() >= {cached}
    timed.close()


def test_what_is_cached_is_waited_for_no_longer_than_its_last_step_allows(model: Path) -> None:
    timed = Timed(model, first_token_slo_s=10, prefix_caching=True)
    timed.generate(PROMPT)
    busy = timed.submit(PROMPT[::-1], max_tokens=50)
    timed.step()
    timed.steps_take(4.0)
    cached = timed.submit(PROMPT)
    timed.step()
    assert not timed.failed
    timed.now += 5.9
    timed.step()
    assert not timed.failed
    timed.now += 0.2
    timed.step()
    assert timed.failed.keys() == {cached}
    timed.run()
    assert busy in timed.finished
    timed.close()


def test_what_was_computed_before_a_deadline_stays_in_the_cache(model: Path) -> None:
    """Whoever asks again with more time finds it, as after an abort."""
    timed = Timed(model, prefix_caching=True)
    late = timed.submit(PROMPT, max_tokens=50, deadline_s=10)
    for _ in range(5):
        timed.step()
    timed.now += 11
    timed.step()
    again = timed.submit(PROMPT)
    timed.run()
    assert late in timed.failed and timed.finished[again].cached_tokens == 32
    timed.close()


def test_one_slow_step_does_not_close_an_engine_that_has_nothing_to_do(model: Path) -> None:
    """Nobody let in is no step taken, and none taken is nothing learned: it would stay so."""
    harness = Harness(model, first_token_slo_s=10)
    harness.generate(PROMPT)
    harness.engine.scheduler.deadlines.took(8000)
    name = harness.submit(PROMPT)
    harness.run()
    assert name in harness.finished
    harness.close()
