"""Engines die at any message boundary, and nobody can tell from what is delivered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.front.fake_engine import ready
from tests.front.scripted import IDS, MAX_SEQS, Scripted, read, text_of

from loramux import wire
from loramux.config import ServerConfig
from loramux.errors import DeadlineExceeded, EngineFailed, PoisonRequest
from loramux.front import engine_client

REQUEST = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 30),
        "max_tokens": st.integers(1, 12),
        "adaptive": st.booleans(),
        "stop": st.sampled_from([(), ("stop",), ("sign",)]),
    }
)
ACTION = st.one_of(
    st.tuples(st.just("new"), REQUEST),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("take")),
    st.tuples(st.just("hear"), st.integers(1, 3)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("die"), st.sampled_from(["exit -9", "exit -11", "heartbeat", "protocol"])),
    st.tuples(st.just("killed in a step"), st.integers(1, 4)),
    st.tuples(st.just("birth")),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
)


@settings(max_examples=150)
@given(st.lists(REQUEST, min_size=1, max_size=4), st.lists(ACTION, max_size=60))
def test_nobody_can_tell_that_engines_died(
    config: ServerConfig,
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[dict[str, Any]],
    actions: list[tuple[Any, ...]],
) -> None:
    asyncio.run(_live(Scripted(config, tmp_path_factory.mktemp("box")), requests, actions))


async def _live(
    it: Scripted, requests: list[dict[str, Any]], actions: list[tuple[Any, ...]]
) -> None:
    asked: dict[str, dict[str, Any]] = {}
    cancelled = set()

    def submit(fields: dict[str, Any]) -> None:
        name = f"r{len(asked)}"
        asked[name] = dict(fields)
        it.submit(name, **fields)

    it.birth()
    it.hear()
    for fields in requests:
        submit(fields)
    for action in actions:
        match action:
            case ("new", fields):
                if it.open:
                    submit(fields)
            case ("step", int(burst)):
                if it.alive:
                    it.take()
                    it.step(burst)
            case ("killed in a step", int(burst)):
                if it.alive:
                    it.take()
                    it.step(burst, told=False)
            case ("take",):
                if it.alive:
                    it.take()
            case ("hear", int(num)):
                if it.alive:
                    it.hear(num)
            case ("die", str(reason)):
                if it.alive:
                    it.die(reason)
            case ("birth",):
                if not it.alive:
                    it.birth()
            case ("cancel", int(number)):
                name = f"r{number}"
                if name in it.ledger:
                    it.generations[name].cancel()
                    cancelled.add(name)
                    assert it.generations[name].done is not None, "also while no engine is up"
            case _:
                await it.settle()
    await it.finish()
    assert set(it.ended) == set(asked) and set(it.ended.values()) == {1}
    for name, fields in asked.items():
        await _check(it, name, fields, cancelled=name in cancelled)


async def _check(it: Scripted, name: str, fields: dict[str, Any], *, cancelled: bool) -> None:
    generation = it.generations[name]
    delta, done = await read(generation), generation.done
    assert done is not None, generation.error
    ids = [IDS[(fields["seed"] + i) % len(IDS)] for i in range(len(delta.token_ids))]
    assert delta.token_ids == ids
    assert [entry.token_id for entry in delta.logprobs or ()] == ids
    text, num = text_of(fields["seed"], fields["max_tokens"], fields["stop"])
    if cancelled:
        assert text.startswith(delta.text) and len(ids) <= num
    else:
        assert (delta.text, len(ids)) == (text, num)
        assert done.finish_reason == ("length" if not done.stop_reason else "stop")
    if ids:
        assert delta.prompt_logprobs is not None and len(delta.prompt_logprobs) == 2
    assert done.num_output_tokens == len(ids)
    if done.by_model is not None:
        assert done.by_model[:2] == (len(ids), 0)


@settings(max_examples=60)
@given(
    st.integers(1, 20),
    st.dictionaries(st.integers(0, 19), st.integers(0, 4), max_size=2),
)
def test_the_poison_is_failed_alone(
    config: ServerConfig,
    tmp_path_factory: pytest.TempPathFactory,
    num: int,
    poison: dict[int, int],
) -> None:
    async def main() -> None:
        it = Scripted(config, tmp_path_factory.mktemp("box"))
        it.birth()
        it.hear()
        for index in range(num):
            it.submit(f"r{index}", seed=index, max_tokens=6)
        it.kills = {f"r{index}": at for index, at in poison.items() if index < num}
        await it.finish()
        assert it.deaths <= len(it.kills) * 6, "log2(8) + 3: eight run at once"
        for name, generation in it.generations.items():
            delta = await read(generation)
            if name in it.kills:
                assert type(generation.error) is PoisonRequest
                assert len(delta.token_ids) == it.kills[name]
            else:
                assert len(delta.token_ids) == 6 and generation.done is not None

    asyncio.run(main())


def test_one_poison_after_the_other_closes_the_server_no_longer_than_the_first(
    scripted: Callable[[], Scripted],
) -> None:
    """Whoever was beside all of them has not to prove more every time."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(MAX_SEQS - 1):
            it.submit(f"r{index}", seed=index, max_tokens=300)
        closed = [0, 0, 0]
        for number in range(len(closed)):
            it.submit(f"poison {number}", seed=0, max_tokens=9)
            it.kills[f"poison {number}"] = 0
            while f"poison {number}" in it.ledger or not it.open:
                if not it.alive:
                    it.birth()
                await it.turn()
                closed[number] += not it.open
                if it.rows:
                    it.step()
        assert len(set(closed)) == 1, closed
        await it.finish()

    asyncio.run(main())


def test_suspects_run_apart_and_nobody_new_is_let_in(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(4):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        it.take()
        it.step()
        it.hear()
        it.box.note(["r1", "r2"])
        it.die("exit -11")
        it.birth()
        await it.turn()
        assert set(it.rows) == {"canary-1"} and not it.open
        it.step()
        await it.turn()
        assert set(it.rows) == {"r1", "r2"} and not it.open
        it.step()
        await it.turn()
        assert set(it.rows) == {"r0", "r1", "r2", "r3"} and it.open
        await it.finish()

    asyncio.run(main())


async def _apart(it: Scripted, *deaths: list[str], reason: str = "exit -11") -> None:
    """An engine after ``deaths`` in steps of those, its canary done."""
    for named in deaths:
        it.box.note(named)
        it.die(reason)
        it.birth()
        await it.turn()
        it.step()
        await it.turn()


def test_a_set_leaves_before_the_next_comes(scripted: Callable[[], Scripted]) -> None:
    """What was made of it is all in the ledger before it is submitted again."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(3):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        await _apart(it, ["r1", "r2"], ["r1", "r2"])
        assert set(it.rows) == {"r1"}
        it.step(2)
        it.step(2)
        it.hear(1)
        await it.settle()
        it.take()
        it.hear(1)
        await it.settle()
        it.take()
        assert set(it.rows) == set(), "the other's turn comes with the answer"
        await it.turn()
        assert set(it.rows) == {"r2"}
        it.step(2)
        await it.turn()
        assert len(it.rows["r1"].output_ids) == 4 and set(it.rows) == {"r0", "r1", "r2"}
        await it.finish()

    asyncio.run(main())


def test_a_suspect_that_leaves_holds_nobody_up(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(2):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        await _apart(it, ["r0"])
        assert set(it.rows) == {"r0"} and not it.open
        it.generations["r0"].cancel()
        await it.settle()
        it.take()
        assert set(it.rows) == {"r1"} and it.open
        await it.finish()

    asyncio.run(main())


def test_a_canary_beside_suspects_keeps_nobody_together(
    scripted: Callable[[], Scripted],
) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(3):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        await _apart(it, ["r0", "r1"], ["r0", "r1", "canary-7"])
        assert set(it.rows) == {"r0"}
        await it.finish()

    asyncio.run(main())


def test_an_engine_that_does_not_say_what_of_may_have_died_of_anything(
    scripted: Callable[[], Scripted],
) -> None:
    """Of anything that it had: not of what it never got."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(3):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        await _apart(it, ["r0", "r1"])
        assert set(it.rows) == {"r0", "r1"}
        await _apart(it, [])
        assert set(it.rows) == {"r0"}
        await it.finish()

    asyncio.run(main())


def test_an_engine_that_cannot_start_has_died_of_no_request(
    scripted: Callable[[], Scripted],
) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        it.submit("r", seed=0, max_tokens=9)
        await _apart(it, ["r"])
        for _ in range(3):
            it.die("exit -9")
            it.birth()
            it.die("exit 1")
            it.birth()
            it.hear()
        await it.finish()
        assert it.generations["r"].done is not None

    asyncio.run(main())


@pytest.mark.parametrize("starved", [True, False])
def test_a_kill_for_want_of_memory_is_no_outsider_s(
    scripted: Callable[[], Scripted], monkeypatch: pytest.MonkeyPatch, starved: bool
) -> None:
    """It looks like a kill -9, but comes again with the request that takes so much."""

    async def main() -> None:
        kills = itertools.count()
        monkeypatch.setattr(engine_client, "oom_kills", lambda: next(kills) if starved else 7)
        it = scripted()
        it.birth()
        it.hear()
        for name in ("good", "bad"):
            it.submit(name, seed=0, max_tokens=30)
        it.take()
        await _apart(it, ["good", "bad"], ["bad"], ["bad"], reason="exit -9")
        await it.finish()
        assert isinstance(it.generations["bad"].error, PoisonRequest) == starved
        assert it.generations["good"].done is not None

    asyncio.run(main())


def test_what_is_known_is_not_asked_for_again(scripted: Callable[[], Scripted]) -> None:
    """The prompt's log-probabilities came; the small model's state and the drafter's wish stay."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        it.submit("r", seed=0, max_tokens=9, adaptive=True, deadline_s=100.0)
        it.take()
        it.step(3)
        it.hear()
        it.die("exit -9")
        it.birth()
        it.hear()
        it.take()
        first, again = it.submissions
        assert (again.output_ids, again.resume) == (IDS[:3], b"3")
        assert first.sampling.prompt_logprobs == 0 and again.sampling.prompt_logprobs is None
        assert replace(again.sampling, prompt_logprobs=0) == first.sampling
        assert again.deadline_s is not None and first.deadline_s is not None
        assert 0 < again.deadline_s < first.deadline_s <= 100
        assert it.observations.snapshot.wearers == {"a" * 64: {""}}
        await it.finish()

    asyncio.run(main())


def test_deadlines_go_on_while_no_engine_is_up(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        now = time.monotonic()
        late = it.submit("late", seed=0, max_tokens=9, deadline_s=5.0, arrived_at=now - 4.99)
        it.submit("timely", seed=0, max_tokens=9, deadline_s=500.0)
        it.die("exit -9")
        assert it.ledger.expire(now + 1) == ["late"]
        assert type(late.error) is DeadlineExceeded
        it.birth()
        it.hear()
        it.take()
        assert set(it.rows) == {"timely"}
        await it.finish()

    asyncio.run(main())


def test_other_weights_do_not_go_on(scripted: Callable[[], Scripted]) -> None:
    """Somebody has put another checkpoint where the first one was."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        generation = it.submit("r", seed=0, max_tokens=9)
        it.die("exit -9")
        it.birth()
        other = ready(2)
        other = replace(other, base=replace(other.base, fingerprint="another"))
        it.client.received(wire.encode(other))
        assert type(generation.error) is EngineFailed and not len(it.ledger)
        await it.client.stop()

    asyncio.run(main())


def test_nobody_is_alone_beside_one_that_has_left(scripted: Callable[[], Scripted]) -> None:
    """The client of what hangs engines does not wait until the watchdog ends them."""

    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        it.submit("good", seed=0, max_tokens=30)
        for name in ("bad", "bad again"):
            it.submit(name, seed=1, max_tokens=9)
            it.take()
            it.box.note(["good", name])
            it.generations[name].cancel()
            it.die("step_timeout")
            for _ in range(4):
                if not it.alive:
                    it.birth()
                await it.turn()
                it.step()
            it.hear()
            assert it.open
        await it.finish()
        assert it.generations["good"].done is not None, it.generations["good"].error

    asyncio.run(main())


def test_poison_that_has_left_is_nobody_s_any_more(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for name in ("good", "bad"):
            it.submit(name, seed=1, max_tokens=9)
        await _apart(it, ["bad"])
        it.box.note(["bad"])
        it.generations["bad"].cancel()
        it.die("step_timeout")
        it.birth()
        await it.turn()
        assert it.open and set(it.rows) == {"good"}
        await it.finish()

    asyncio.run(main())
