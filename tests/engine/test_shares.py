"""A tenant's share of the pool: its own rows keep within it, and nobody else can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.engine.fakes import Bench
from tests.harness import Harness

from loramux.engine.policy import FairOrder
from loramux.engine.scheduler import LOOKAHEAD, Wait
from loramux.errors import RequestTooLarge
from loramux.memory.frames import Owner
from loramux.request import Request, SamplingParams, Speculation
from loramux.wire import frames_of


def frames_in_use(running: list[Request], tenant: str) -> int:
    """Counted from the page tables, a frame once."""
    return len(
        {
            int(frame)
            for request in running
            if request.tenant == tenant
            for kv in request.kvs
            for frame in kv.page_table[: kv.num_pages]
        }
    )


def within(bench: Bench, tenant: str = "a") -> int:
    held = frames_in_use(bench.scheduler.running, tenant)
    assert held == bench.scheduler._pages.held(tenant)
    return held


def test_a_share_is_what_a_person_means_by_it() -> None:
    for percent in range(101):
        assert frames_of(percent / 100, 100) == percent
    assert frames_of(0.5, 7) == 3


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nobody_has_more_than_its_share_and_everything_ends(data: st.DataObject) -> None:
    """Random requests of two tenants with shares and one without, aborted at random, the books
    balanced after every step; prompts have beginnings in common."""
    sizes = {name: data.draw(st.integers(1, 3), label=name) for name in "uvw"}
    num_frames = 24
    shares = {
        tenant: data.draw(st.integers(7, num_frames), label=f"share of {tenant}") / num_frames
        for tenant in "ab"
    }
    bench = Bench(
        num_frames,
        sizes,
        max_num_seqs=data.draw(st.integers(1, 6), label="seqs"),
        max_batch_tokens=data.draw(st.sampled_from([5, 16, 64]), label="tokens"),
        prefix_caching=data.draw(st.booleans(), label="prefix"),
    )

    def step() -> None:
        bench.step(land=data.draw(st.booleans(), label="land"))
        for tenant, share in shares.items():
            assert within(bench, tenant) <= frames_of(share, num_frames)

    asked = []
    for index in range(data.draw(st.integers(1, 12), label="requests")):
        tenant = data.draw(st.sampled_from("abc"), label="tenant")
        asked.append(
            bench.add(
                f"r{index}",
                ids=list(range(data.draw(st.integers(1, 20), label="prompt"))),
                max_tokens=data.draw(st.integers(1, 8), label="max"),
                adapter=data.draw(st.sampled_from([None, *sizes]), label="adapter"),
                tenant=tenant,
                pool_share=shares.get(tenant),
            )
        )
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            step()
        if data.draw(st.integers(0, 9), label="abort") == 0:
            victim = asked.pop(data.draw(st.integers(0, len(asked) - 1)))
            if victim not in bench.finished:
                bench.scheduler.finish(victim)
    for _ in range(500):
        step()
    bench.run()
    assert {r.id for r in bench.finished} >= {r.id for r in asked}
    assert bench.pool.frames.count(Owner.KV) == 0
    assert not bench.scheduler._pages._held


def test_what_could_never_run_is_refused() -> None:
    bench = Bench(16)
    bench.add("fits", num_prompt=12, max_tokens=4, tenant="a", pool_share=0.25)
    with pytest.raises(RequestTooLarge, match="needs 5 frames .* may hold 4"):
        bench.add("never", num_prompt=13, max_tokens=4, tenant="a", pool_share=0.25)
    bench.add("another's", num_prompt=13, max_tokens=4, tenant="b")
    with pytest.raises(RequestTooLarge):
        bench.add("nothing", num_prompt=1, max_tokens=1, tenant="a", pool_share=0.0)


def test_the_tenant_s_own_newest_gives_way_and_nobody_else_s() -> None:
    bench = Bench(100, prefix_caching=False)
    share: dict[str, Any] = {"tenant": "a", "pool_share": 0.08}
    first = bench.add("first", num_prompt=8, max_tokens=20, **share)
    second = bench.add("second", num_prompt=8, max_tokens=20, **share)
    other = bench.add("other", num_prompt=8, max_tokens=40, tenant="b")
    bench.step()
    newer = bench.add("newer", num_prompt=8, max_tokens=40, tenant="b")
    bench.step()
    assert set(bench.scheduler.running) == {first, second, other, newer}
    lost = set()
    preempt = bench.scheduler._preempt

    def seen(request: Request) -> None:
        lost.add(request.id)
        preempt(request)

    bench.scheduler._preempt = seen  # type: ignore[method-assign]
    while bench.scheduler.running or len(bench.scheduler.waiting):
        bench.step()
        assert within(bench) <= 8
    assert lost == {"second"}
    assert set(bench.finished) == {first, second, other, newer}


def trace(more: int, seats: int) -> list[dict[str, int]]:
    """What two tenants' rows compute in every step beside a third's, of which ``more`` wait."""
    names = [f"x{i}" for i in range(more)]
    bench = Bench(200, dict.fromkeys(names, 1), max_num_seqs=seats)
    share: dict[str, Any] = {"tenant": "a", "pool_share": 10 / 200}
    bench.add("a", num_prompt=20, max_tokens=20, **share)
    bench.step()
    for name in names:
        bench.add(f"a {name}", adapter=name, num_prompt=20, max_tokens=20, **share)
    steps = []
    for index in range(19):
        for tenant in "bc":
            bench.add(f"{tenant}{index}", num_prompt=6, max_tokens=5 + index % 3, tenant=tenant)
        ran = bench.step()
        assert set(bench.adapters.loads) == set(), "nothing is loaded for who is held back"
        steps.append({name: num for name, num in ran.items() if name[0] in "bc"})
    return steps


@pytest.mark.parametrize("seats", [3, 64])
def test_others_run_as_if_nobody_waited_for_the_share(seats: int) -> None:
    """However many, for however many adapters: more than anybody looks ahead."""
    assert trace(LOOKAHEAD + 10, seats) == trace(0, seats)


def test_nobody_owes_a_seat_to_who_could_not_take_it() -> None:
    bench = Bench(200, {"x": 1}, max_num_seqs=2, fairness_debt_tokens=20)
    share: dict[str, Any] = {"tenant": "a", "pool_share": 10 / 200}
    bench.add("brings x", adapter="x", tenant="c")
    bench.run()
    bench.add("a", num_prompt=4, max_tokens=36, **share)
    bench.step()
    bench.add("b", num_prompt=60, max_tokens=40, tenant="b")
    bench.step()
    bench.add("waits", adapter="x", num_prompt=36, max_tokens=2, **share)
    for _ in range(30):
        assert set(bench.step()) == {"a", "b"}
    assert bench.scheduler.counts.preemptions == 0
    bench.run()
    assert len(bench.finished) == 4


def test_who_waits_for_the_share_is_told_so_and_passed_over_by_nobody_of_its_own() -> None:
    bench = Bench(100)
    share: dict[str, Any] = {"tenant": "a", "pool_share": 0.1}
    bench.add("runs", num_prompt=16, max_tokens=12, **share)
    bench.step()
    large = bench.add("large", num_prompt=24, max_tokens=4, **share)
    small = [bench.add(f"small {i}", num_prompt=1, max_tokens=1, **share) for i in range(3)]
    bench.step()
    assert {bench.scheduler.why_waiting(r) for r in (large, *small)} == {Wait.SHARE}
    bench.run()
    assert [r.id for r in bench.finished][0] == "runs"
    assert large.first_scheduled is not None


def test_a_share_that_shrinks_or_goes_leaves_nobody_waiting_for_ever() -> None:
    bench = Bench(100)
    for index in range(3):
        bench.add(f"r{index}", num_prompt=30, max_tokens=10, tenant="a")
    bench.step()
    bench.add("shrunk", num_prompt=4, max_tokens=4, tenant="a", pool_share=0.02)
    bench.run()
    bench.add("first", num_prompt=4, max_tokens=4, tenant="a", pool_share=0.02)
    bench.add("second", num_prompt=4, max_tokens=4, tenant="a", pool_share=0.02)
    bench.step()
    assert len(bench.scheduler.running) == 1
    bench.add("free", num_prompt=4, max_tokens=4, tenant="a")
    bench.step()
    assert len(bench.scheduler.running) == 3
    bench.run()
    assert len(bench.finished) == 7


def waiting(tenant: str, name: str) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=1)
    return Request(name, prompt_ids=[1], sampling=sampling, tenant=tenant)


def test_who_is_held_back_saves_up_no_credit_and_is_no_measure() -> None:
    order = FairOrder()
    first, other = waiting("a", "a0"), waiting("b", "b0")
    for request in (first, other):
        order.push(request)
    order.hold_back("a")
    assert order.head() is other
    order.charge(other, inputs=1000, outputs=0)
    late = waiting("c", "c0")
    order.push(late)
    assert order.served[late.fair_key] == order.served[other.fair_key] > 0
    order.let_go("a")
    assert order.served[first.fair_key] == order.served[other.fair_key]
    assert not order.is_held_back("a")
    assert {r.id for r in order.walk()} == {"a0", "b0", "c0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("shares") / "base")


@pytest.mark.parametrize("overlap", [False, True])
def test_drafted_and_preempted_by_its_share_is_uninterrupted(model: Path, overlap: bool) -> None:
    """NaN in every freed frame, the books balanced after every step."""
    ask = Speculation(drafters=("lookup",), max_draft_tokens=4)
    prompts = [[7, 8, 9, 10] * 6, [5, 6] * 9, list(range(3, 23))]

    def run(share: float | None) -> Harness:
        harness = Harness(model, num_frames=200, page_tokens=4, speculation="auto", overlap=overlap)
        for index, prompt in enumerate(prompts * 2):
            harness.submit(
                prompt,
                name=f"r{index}",
                tenant="a",
                pool_share=share,
                speculation=ask if index % 2 else None,
                max_tokens=24,
                temperature=float(index % 3 == 0),
                seed=index,
            )
        scheduler = harness.engine.scheduler
        while harness.engine.has_work:
            harness.step()
            if share is not None:
                held = frames_in_use(scheduler.running, "a")
                assert held == scheduler._pages.held("a") <= frames_of(share, 200)
        harness.close()
        return harness

    free, bound = run(None), run(0.1)
    assert sum(step.stats.get("preemptions", 0) for step in bound.steps) > 0
    assert bound.outputs == free.outputs and not bound.failed
