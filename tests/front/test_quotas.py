"""Limits of tenants, counted: nothing is lost, nothing is given twice."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.front.house import configure, running, spec, until
from tests.front.uploading import WAIT, upload

from loramux.errors import EngineFailed, InvalidRequest, LoramuxError, QuotaExceeded, RateLimited
from loramux.front.admission import Claim
from loramux.front.front import Front
from loramux.front.generation import GenerationSpec
from loramux.front.keys import Limits, editing
from loramux.front.quotas import MAX_UPLOADS, Quotas
from loramux.request import SamplingParams
from loramux.wire import Submit


class Desk:
    """Quotas with a clock that is moved by hand."""

    def __init__(self, **limits: int) -> None:
        self.now = 1000.0
        self.limits = {"acme": Limits(**limits)}
        self.rejected: list[str] = []
        self.quotas = Quotas(
            lambda tenant: self.limits.get(tenant, Limits()),
            self.rejected.append,
            clock=lambda: self.now,
        )
        self.serial = 0

    def start(self, prompt: int, max_tokens: int, tenant: str = "acme") -> GenerationSpec:
        """What HTTP does with one choice."""
        self.quotas.check_tokens(tenant, prompt + max_tokens)
        self.serial += 1
        made = GenerationSpec(
            request_id=f"r{self.serial}",
            adapters=(),
            prompt_ids=[1] * prompt,
            sampling=SamplingParams(seed=1, max_tokens=max_tokens),
            tenant=tenant,
        )
        self.quotas.start(made)
        return made

    def level(self, tenant: str = "acme") -> float:
        """Tokens that may be asked for now."""
        for num in range(200, 0, -1):
            try:
                self.quotas.check_tokens(tenant, num)
            except LoramuxError:
                continue
            return num
        return 0


def test_choices_in_flight() -> None:
    desk = Desk(max_requests=3)
    quotas = desk.quotas
    quotas.hold("acme", 2)
    with pytest.raises(RateLimited) as caught:
        quotas.hold("acme", 2)
    assert caught.value.retry_after_s and desk.rejected == ["rate_limit_exceeded"]
    quotas.hold("acme", 1)
    quotas.hold("else", 100)
    with pytest.raises(InvalidRequest) as refused:
        quotas.hold("acme", 4)
    assert refused.value.param == "n"
    quotas.release("acme", 3)
    running = [desk.start(1, 1) for _ in range(3)]
    with pytest.raises(RateLimited):
        quotas.hold("acme", 1)
    quotas.end(running[0], 1)
    quotas.hold("acme", 1)


def test_a_minute_of_tokens() -> None:
    desk = Desk(tokens_per_minute=60)
    first = desk.start(10, 40)
    assert desk.level() == 10
    with pytest.raises(RateLimited) as caught:
        desk.start(1, 24)
    assert caught.value.retry_after_s == 15, "15 tokens are missing, one comes a second"
    desk.now += 14.5
    with pytest.raises(RateLimited) as caught:
        desk.start(1, 24)
    assert caught.value.retry_after_s == 0.5
    desk.now += 0.5
    second = desk.start(1, 24)
    assert desk.level() == 0
    desk.quotas.end(first, 5)
    assert desk.level() == 35, "40 were reserved, 5 came"
    desk.quotas.end(second, 24)
    assert desk.level() == 35
    desk.now += 3600
    desk.start(30, 30)
    assert desk.level() == 0, "a minute's worth is the most that is saved up"


def test_what_can_never_fit() -> None:
    desk = Desk(tokens_per_minute=60)
    desk.start(59, 1)
    with pytest.raises(InvalidRequest) as caught:
        desk.start(60, 1)
    assert caught.value.param == "max_tokens"
    desk.limits["acme"] = Limits(tokens_per_minute=0, max_requests=0)
    with pytest.raises(InvalidRequest):
        desk.quotas.check_tokens("acme", 1)
    with pytest.raises(InvalidRequest):
        desk.quotas.hold("acme", 1)


def test_limits_that_change_while_requests_run() -> None:
    desk = Desk()
    free = desk.start(100, 100)
    desk.limits["acme"] = Limits(tokens_per_minute=60)
    assert desk.level() == 60
    held = desk.start(5, 25)
    desk.quotas.end(free, 0)
    assert desk.level() == 30, "nothing comes back that was not taken"
    desk.limits["acme"] = Limits(tokens_per_minute=20)
    assert desk.level() == 20
    desk.quotas.end(held, 0)
    assert desk.level() == 20
    desk.limits.clear()
    desk.quotas.end(desk.start(1000, 1000), 0)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 40), st.integers(0, 40)),
        st.tuples(st.just("end"), st.integers(0, 9), st.floats(0, 1)),
        st.tuples(st.just("wait"), st.floats(0, 30), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_schedule_gets_more_than_its_rate(steps: list[tuple[str, Any, Any]]) -> None:
    desk = Desk(tokens_per_minute=60, max_requests=5)
    began, used = desk.now, 0
    going: list[GenerationSpec] = []
    for what, first, second in steps:
        if what == "start":
            try:
                desk.quotas.hold("acme", 1)
            except RateLimited:
                assert len(going) == 5
                continue
            assert len(going) < 5
            try:
                going.append(desk.start(first, second))
                used += first + second
            except LoramuxError:
                pass
            desk.quotas.release("acme", 1)
        elif what == "end" and going:
            spec = going.pop(first % len(going))
            num = int(second * spec.sampling.max_tokens)
            desk.quotas.end(spec, num)
            used -= spec.sampling.max_tokens - num
        elif what == "wait":
            desk.now += first
        assert used <= 60 + (desk.now - began) + 1e-6
    for spec in going:
        desk.quotas.end(spec, 0)
    assert not desk.quotas._choices and not desk.quotas._reserved


def test_uploads_on_their_way() -> None:
    desk = Desk()
    entered = [desk.quotas.uploading("acme") for _ in range(MAX_UPLOADS)]
    for each in entered:
        each.__enter__()
    with pytest.raises(RateLimited), desk.quotas.uploading("acme"):
        pass
    with desk.quotas.uploading("else"):
        pass
    entered.pop().__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), desk.quotas.uploading("acme"):
        raise ZeroDivisionError
    with desk.quotas.uploading("acme"):
        pass


def limit(front: Front, **limits: Any) -> None:
    with editing(front.config.keys_file) as content:
        content.tenants["acme"] = Limits(**limits)
    front.keys._checked_at = float("-inf")
    assert not front.keys.guarded


def test_adapters_and_their_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            limit(front, max_adapters=2)
            first = await upload(front, "a", b"1" * 10, tenant="acme")
            with pytest.raises(LoramuxError):
                await upload(front, "bad", b"x", tenant="acme", bad=["no"])
            await upload(front, "b", b"2" * 10, tenant="acme")  # one that failed does not count
            with pytest.raises(QuotaExceeded, match="2 adapters.* may have 2"):
                await upload(front, "c", b"3", tenant="acme")
            with pytest.raises(QuotaExceeded):  # a new generation is one more
                await upload(front, "a", b"3", tenant="acme", expected_generation=1)
            with pytest.raises(QuotaExceeded):  # nor does trying again what failed
                await upload(front, "bad", b"x", tenant="acme", bad=["no"])
            again = await upload(front, "a", b"1" * 10, tenant="acme")
            assert again == first, "what is there already is no new adapter"
            await upload(front, "c", b"3", tenant="acme", validate_only=True)
            await upload(front, "c", b"3", tenant="else")
            await upload(front, "c", b"3")
            limit(front, max_adapter_bytes=30)
            with pytest.raises(QuotaExceeded, match="20 bytes .* may have 30.* has 11"):
                await upload(front, "c", b"3" * 11, tenant="acme")
            await upload(front, "c", b"3" * 10, tenant="acme")
            front.adapters.retain(front.adapters.show("b", tenant="acme").digest)
            await front.adapters.delete("b", tenant="acme")
            assert front.adapters.list(tenant="acme")[1].status == "deleting"
            await upload(front, "d", b"4" * 10, tenant="acme")  # at once, not when it is gone
            names = [view.name for view in front.adapters.list(tenant="acme")]
            assert {"a", "c", "d"} <= set(names)

    asyncio.run(main())


def test_uploads_at_once_take_the_last_place_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            limit(front, max_adapters=3)
            uploads = [upload(front, f"n{i}", b"%d" % i, WAIT, tenant="acme") for i in range(8)]
            done = await asyncio.gather(*uploads, return_exceptions=True)
            refused = [each for each in done if isinstance(each, QuotaExceeded)]
            assert len(refused) == 5 and len(front.adapters.list(tenant="acme")) == 3

    asyncio.run(main())


def test_the_engine_hears_of_the_share_as_it_is_now(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            told = []
            send = front._engine._send
            front._engine._send = lambda message: (told.append(message), send(message))  # type: ignore[method-assign,assign,func-returns-value]
            for share in (0.5, None):
                limit(front, max_pool_share=share)
                for tenant in ("acme", "else"):
                    with front.admit(Claim(tenant=tenant)):
                        generation = front.submit(spec(f"{tenant} {share}", tenant=tenant))
                    async for _ in generation:
                        pass
            shares = {m.request_id: m.pool_share for m in told if isinstance(m, Submit)}
            assert shares == {
                "acme 0.5": 0.5,
                "else 0.5": None,
                "acme None": None,
                "else None": None,
            }

    asyncio.run(main())


@pytest.mark.parametrize("script", ["", "fail=numerical_error", "delay=0.05", "die=2", "stop=42"])
def test_every_end_gives_back(tmp_path: Path, script: str) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            limit(front, max_requests=2, tokens_per_minute=1000)
            front.quotas._clock = lambda: 0.0
            with front.admit(Claim(choices=2, tenant="acme")):
                made = [spec(f"r{i}", script, tenant="acme") for i in range(2)]
                generations = [front.submit(each) for each in made]
            with pytest.raises(RateLimited):
                front.admit(Claim(choices=1, tenant="acme"))
            assert front.snapshot.rejected == {"rate_limit_exceeded": 1}
            front.admit(Claim(choices=1, tenant="else")).release()
            outputs = 0
            for generation in generations:
                with suppress(EngineFailed):
                    async for delta in generation:
                        outputs += len(delta.token_ids)
                        if script.startswith("delay"):
                            generation.cancel()
            used = 1000 - front.quotas._buckets["acme"].level
            assert used == 10 + outputs, "prompts and what was delivered"
            await until(lambda: front.info is not None)
            front.admit(Claim(choices=2, tenant="acme")).release()
            assert not front.quotas._choices and not front.quotas._reserved

    asyncio.run(main())
