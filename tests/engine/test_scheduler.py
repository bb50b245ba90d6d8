"""Who runs, who waits, who gives way: the scheduler on integers, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fakes import Bench

from loramux.engine.scheduler import LOOKAHEAD
from loramux.errors import LoramuxError
from loramux.memory.frames import Owner


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    bench = Bench(16, max_batch_tokens=16)
    bench.add("a", num_prompt=20, max_tokens=3)
    assert [bench.step() for _ in range(4)] == [{"a": 16}, {"a": 4}, {"a": 1}, {"a": 1}]
    assert not bench.scheduler.running
    assert bench.pool.frames.count(Owner.KV) == 0


def test_decodes_go_before_prompts() -> None:
    bench = Bench(64, max_batch_tokens=16)
    bench.add("a", num_prompt=4, max_tokens=8)
    bench.step()
    bench.add("b", num_prompt=40)
    assert bench.step() == {"a": 1, "b": 15}
    assert bench.step() == {"a": 1, "b": 15}


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    bench = Bench(4, {"x": 2})
    bench.add("fits", num_prompt=12, max_tokens=4)
    with pytest.raises(LoramuxError, match="needs 5 frames") as error:
        bench.add("never", num_prompt=12, max_tokens=5)
    assert error.value.code == "request_too_large"
    with pytest.raises(LoramuxError):
        bench.add("never with adapter", num_prompt=12, max_tokens=4, adapter="x")


def test_a_row_waits_for_its_own_adapter_and_nobody_else_does() -> None:
    bench = Bench(32, {"x": 2})
    bench.add("cold", adapter="x")
    bench.add("base")
    assert bench.step(land=False) == {"base": 4}
    assert bench.step(land=True) == {"base": 1}
    assert bench.step() == {"base": 1, "cold": 4}


def test_the_newest_gives_way_and_finishes_later() -> None:
    bench = Bench(6)
    old = bench.add("old", num_prompt=8, max_tokens=12)
    new = bench.add("new", num_prompt=4, max_tokens=12)
    bench.run()
    assert [r.id for r in bench.finished] == ["old", "new"]
    assert bench.scheduler.counts.preemptions > 0
    assert old.num_outputs == new.num_outputs == 12


def test_leased_adapters_stay_and_warm_ones_go() -> None:
    bench = Bench(8, {"x": 3, "y": 3})
    bench.add("a", adapter="x", max_tokens=12)
    bench.step()
    bench.add("b", adapter="y", max_tokens=4)
    while not bench.finished:
        assert "a" in bench.step(), "a runs on, whoever waits"
    assert bench.adapters.loads.count("x") == 1
    bench.run()
    assert [r.id for r in bench.finished] == ["a", "b"]


def test_what_the_cache_has_is_not_computed_again() -> None:
    bench = Bench(32)
    ids = list(range(13))
    bench.add("first", ids=ids)
    bench.run()
    second = bench.add("second", ids=ids)
    assert bench.step() == {"second": 1}, "three full pages are cached"
    assert second.num_cached == 12
    bench.run()
    third = bench.add("third", ids=ids[:12])
    assert bench.step() == {"third": 4}, "the last token's logits are always computed"
    assert third.num_cached == 8


def test_another_adapter_or_salt_shares_no_pages() -> None:
    bench = Bench(64, {"x": 1, "y": 1})
    ids = list(range(13))
    for name, knobs in {
        "base": {},
        "x": {"adapter": "x"},
        "y": {"adapter": "y"},
        "salt": {"cache_salt": "s"},
        "tenant": {"tenant": "t"},
    }.items():
        request = bench.add(name, ids=ids, **knobs)
        bench.run()
        assert request.num_cached == 0, name
        again = bench.add(name + "2", ids=ids, **knobs)
        bench.run()
        assert again.num_cached == 12, name


def test_prompt_logprobs_write_the_cache_and_do_not_read_it() -> None:
    from loramux.request import Request, SamplingParams

    bench = Bench(32)
    ids = list(range(13))
    bench.add("first", ids=ids)
    bench.run()
    echo = Request(
        "echo", prompt_ids=ids, sampling=SamplingParams(seed=0, max_tokens=1, prompt_logprobs=0)
    )
    bench.scheduler.add(echo)
    assert bench.step() == {"echo": 13}
    assert echo.num_cached == 0


def test_the_least_served_adapter_goes_first() -> None:
    bench = Bench(256, {"x": 1, "y": 1}, max_num_seqs=2)
    for index in range(6):
        bench.add(f"x{index}", adapter="x", max_tokens=8)
    bench.step()
    bench.add("y0", adapter="y", max_tokens=8)
    bench.run()
    order = [r.id for r in bench.finished]
    assert order.index("y0") <= 2, order


def test_coming_back_from_idleness_gives_no_credit() -> None:
    bench = Bench(256, {"x": 1, "y": 1}, max_num_seqs=1)
    for index in range(3):
        bench.add(f"x{index}", adapter="x", max_tokens=8)
    for _ in range(12):
        bench.step()
    for index in range(3):
        bench.add(f"y{index}", adapter="y", max_tokens=8)
    bench.add("x3", adapter="x", max_tokens=8)
    bench.run()
    order = [r.id for r in bench.finished]
    assert order.index("x2") < order.index("y2"), order


def test_debt_makes_the_most_served_give_a_seat() -> None:
    """Before the rows of a step are chosen: its pages are others' from then on."""
    bench = Bench(256, {"x": 1, "y": 1}, max_num_seqs=2, fairness_debt_tokens=20)
    for index in range(2):
        bench.add(f"x{index}", adapter="x", max_tokens=400)
    for _ in range(3):
        bench.step()
    bench.add("y", adapter="y", max_tokens=4)
    for _ in range(30):
        bench.step()
    assert [r.id for r in bench.finished] == ["y"]
    assert bench.scheduler.counts.preemptions == 1
    bench.run()
    assert len(bench.finished) == 3


@pytest.mark.parametrize("length", [30, 200])
def test_two_whose_prompts_cost_more_than_the_debt_do_not_take_turns_for_ever(length: int) -> None:
    """A prompt alone makes its key the most served: that may not cost it the seat it just got."""
    bench = Bench(
        64,
        {"x": 1, "y": 1},
        max_num_seqs=1,
        max_batch_tokens=8,
        fairness_debt_tokens=10,
        prefix_caching=False,
    )
    for name in "xy":
        bench.add(name, ids=list(range(length)), adapter=name, max_tokens=30)
    for _ in range(4 * (2 * length // 8 + 60)):
        bench.step()
    assert {r.id for r in bench.finished} == {"x", "y"}


def test_a_long_prompt_is_not_given_away_for_short_ones() -> None:
    """What it costs to compute it again is part of the bill."""
    bench = Bench(256, {"long": 1, "short": 1}, max_num_seqs=2, fairness_debt_tokens=20)
    bench.add("s", adapter="short", max_tokens=40)
    bench.step()
    bench.add("long", ids=list(range(300)), adapter="long", max_tokens=40)
    for _ in range(6):
        bench.step()
    for index in range(8):
        bench.add(f"s{index}", adapter="short", max_tokens=4)
    bench.run()
    assert bench.scheduler.counts.preemptions == 0
    assert len(bench.finished) == 10


def test_a_large_adapter_is_not_passed_over_for_ever() -> None:
    bench = Bench(10, {"large": 8, "small": 1}, max_num_seqs=4)
    bench.add("s0", adapter="small", max_tokens=8)
    bench.step()
    bench.step()
    bench.add("big", adapter="large", max_tokens=2)
    served = 0
    for index in range(1, 400):
        bench.add(f"s{index}", adapter="small", max_tokens=8)
        bench.step()
        served += 1
        if any(r.id == "big" for r in bench.finished):
            break
    assert any(r.id == "big" for r in bench.finished), "small requests starve the large adapter"


def test_adapters_of_those_next_in_line_are_fetched_while_every_seat_is_taken() -> None:
    bench = Bench(64, {"x": 2, "y": 2, "z": 2}, max_num_seqs=1)
    bench.add("running", max_tokens=20)
    bench.step()
    for name in ("y", "x", "z"):
        bench.add(f"next {name}", adapter=name)
    assert bench.step(land=False) == {"running": 1}
    assert bench.adapters.loads == ["y", "x", "z"] == bench.adapters.wanted
    bench.step()
    assert set(bench.adapters.frames) == {"x", "y", "z"}


def test_fetching_ahead_goes_no_further_than_the_lookahead() -> None:
    names = [f"a{i}" for i in range(LOOKAHEAD + 10)]
    bench = Bench(256, dict.fromkeys(names, 1), max_num_seqs=1)
    bench.add("running", max_tokens=20)
    bench.step()
    for name in names:
        bench.add(f"next {name}", adapter=name)
    bench.step()
    assert bench.adapters.loads == names[:LOOKAHEAD]


def test_fetching_ahead_stops_where_frames_do_and_keeps_what_is_wanted_sooner() -> None:
    bench = Bench(9, {"x": 3, "y": 3, "z": 3, "small": 1}, max_num_seqs=1)
    bench.add("running", max_tokens=4)
    bench.step()
    for name in ("x", "y", "z", "small"):
        bench.add(f"next {name}", adapter=name)
    for _ in range(2):
        bench.step()
        assert bench.adapters.loads == ["x", "y"], "x is not evicted for z"
    assert bench.adapters.wanted == ["x", "y"]
    bench.run()
    assert len(bench.finished) == 5


def test_fetching_ahead_leaves_running_rows_room_to_grow() -> None:
    bench = Bench(6, {"x": 4}, max_num_seqs=1)
    bench.add("running", num_prompt=8, max_tokens=6)
    bench.add("next", adapter="x", num_prompt=1, max_tokens=1)
    while not bench.finished:
        bench.step(land=False)
        assert bench.adapters.loads == []
    bench.run()
    assert bench.scheduler.counts.preemptions == 0 and len(bench.finished) == 2


def test_what_nobody_waits_for_any_more_is_not_wanted() -> None:
    bench = Bench(64, {"x": 2, "y": 2})
    gone = bench.add("gone", adapter="x")
    bench.add("stays", adapter="y")
    bench.step(land=False)
    assert bench.adapters.wanted == ["x", "y"]
    bench.scheduler.finish(gone)
    bench.step(land=False)
    assert bench.adapters.wanted == ["y"]
    bench.run()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_everything_ends_and_the_books_balance(data: st.DataObject) -> None:
    """Random requests over adapters of random sizes in a tight pool, aborted at random."""
    sizes = {name: data.draw(st.integers(1, 4), label=name) for name in "uvwxyz"}
    bench = Bench(
        data.draw(st.integers(12, 24), label="frames"),
        sizes,
        max_num_seqs=data.draw(st.integers(1, 5), label="seqs"),
        max_batch_tokens=data.draw(st.sampled_from([5, 16, 64]), label="tokens"),
        fairness_debt_tokens=data.draw(st.sampled_from([10, 10**9]), label="debt"),
        prefix_caching=data.draw(st.booleans(), label="prefix"),
    )
    requests = []
    for index in range(data.draw(st.integers(1, 14), label="requests")):
        adapter = data.draw(st.sampled_from([None, *sizes]), label="adapter")
        length = data.draw(st.integers(1, 20), label="prompt")
        requests.append(
            bench.add(
                f"r{index}",
                ids=list(range(length)),
                max_tokens=data.draw(st.integers(1, 8), label="max"),
                adapter=adapter,
            )
        )
        for _ in range(data.draw(st.integers(0, 3), label="steps")):
            bench.step(land=data.draw(st.booleans(), label="land"))
        if data.draw(st.integers(0, 9), label="abort") == 0:
            victim = requests.pop(data.draw(st.integers(0, len(requests) - 1)))
            if victim not in bench.finished:
                bench.scheduler.finish(victim)
                bench.pool.check()
    bench.run()
    assert {r.id for r in bench.finished} >= {r.id for r in requests}
    assert all(r.num_outputs == r.sampling.max_tokens for r in bench.finished)
    assert bench.pool.frames.count(Owner.KV) == 0
    assert all(leases == 0 for leases in bench.adapters.leases.values())
