"""The order of eviction: what it says, and that it keeps what is used."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.memory.eviction import EvictionOrder, Frequency


class Cache:
    """Things of one frame and one cost, brought in when they are missing; counts the hits."""

    def __init__(self, size: int) -> None:
        self.order = EvictionOrder()
        self.frequency = Frequency()
        self.size = size
        self.held: set[int] = set()
        self.hits = 0

    def use(self, thing: int) -> None:
        if thing in self.held:
            self.hits += 1
            self.order.withdraw(thing)
        elif len(self.held) == self.size:
            assert self.order.evict(1)
        self.held.add(thing)
        self.frequency.use(thing)
        self.order.offer(
            thing,
            num_frames=1,
            cost_s=1.0,
            uses=self.frequency.of(thing),
            evict=lambda: self.held.remove(thing),
        )


def lru_hits(trace: list[int], size: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for thing in trace:
        if thing in held:
            hits += 1
            held.move_to_end(thing)
        else:
            if len(held) == size:
                held.popitem(last=False)
            held[thing] = None
    return hits


def zipf(seed: int, length: int, things: int, exponent: float) -> list[int]:
    weights = [1 / (rank + 1) ** exponent for rank in range(things)]
    return random.Random(seed).choices(range(things), weights, k=length)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [16, 64])
def test_a_skewed_trace_has_more_hits_than_the_order_of_last_use(seed: int, size: int) -> None:
    trace = zipf(seed, 20_000, 1_000, 0.9)
    cache = Cache(size)
    for thing in trace:
        cache.use(thing)
    assert cache.hits > 1.15 * lru_hits(trace, size), (cache.hits, lru_hits(trace, size))


def test_a_hot_thing_survives_a_scan_of_a_thousand_cold_ones() -> None:
    cache = Cache(20)
    for _ in range(100):
        cache.use(-1)
    for cold in range(1_000):
        cache.use(cold)
    assert -1 in cache.held
    assert lru_hits([-1, *range(1_000), -1], 20) == 0, "the order of last use would have lost it"


def test_what_was_hot_does_not_stay_for_ever() -> None:
    cache = Cache(20)
    for _ in range(5_000):
        cache.use(-1)
    for round_ in range(200):
        for thing in range(200):
            cache.use(thing + 1_000 * (round_ // 100))
    assert -1 not in cache.held


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_eviction_takes_the_least_worth_and_all_or_nothing(data: st.DataObject) -> None:
    order = EvictionOrder()
    model: dict[int, tuple[float, int, int]] = {}
    gone: list[int] = []
    clock, turn = 0.0, 0
    for _ in range(data.draw(st.integers(1, 40), label="events")):
        event = data.draw(st.sampled_from(["offer", "offer", "withdraw", "evict"]))
        if event == "offer":
            key, frames = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4))
            cost, uses = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
            if key in model:
                continue
            turn += 1
            model[key] = (clock + uses * cost / frames, turn, frames)

            def evict(key: int = key) -> None:
                gone.append(key)

            order.offer(key, num_frames=frames, cost_s=cost, uses=uses, evict=evict)
        elif event == "withdraw" and model:
            key = data.draw(st.sampled_from(sorted(model)))
            del model[key]
            order.withdraw(key)
        elif event == "evict":
            num, below = data.draw(st.integers(0, 8)), data.draw(st.sampled_from([1.0, 3.0, 1e9]))
            expected: list[int] = []
            for key in sorted(model, key=lambda key: model[key][:2]):
                if sum(model[k][2] for k in expected) >= num or model[key][0] >= below:
                    break
                expected.append(key)
            enough = sum(model[k][2] for k in expected) >= num
            gone.clear()
            assert order.evict(num, below) is enough
            assert gone == (expected if enough else [])
            for key in gone:
                clock = model.pop(key)[0]
        assert order.num_frames == sum(frames for _, _, frames in model.values())
        assert all((key in order) == (key in model) for key in range(10))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60))
def test_an_old_use_counts_half_after_each_half_life(uses: list[int]) -> None:
    frequency = Frequency(half_life_uses=7.0)
    for key in uses:
        frequency.use(key)
    for key in range(6):
        ages = [len(uses) - at for at, used in enumerate(uses, 1) if used == key]
        assert frequency.of(key) == pytest.approx(sum(2.0 ** (-age / 7.0) for age in ages))


def test_the_least_used_are_forgotten_when_there_are_too_many() -> None:
    frequency = Frequency(most=100)
    for key in range(1_000):
        frequency.use("hot")
        frequency.use(key)
    assert len(frequency._counts) <= 100
    assert frequency.of("hot") > 500 and frequency.of(0) == 0.0


def offers(order: EvictionOrder, count: int) -> Callable[[], None]:
    def again() -> None:
        for key in range(count):
            order.offer(key, num_frames=1, cost_s=1.0, evict=lambda: None)
            order.withdraw(key)

    return again


def test_coming_and_going_leaves_nothing_behind() -> None:
    order = EvictionOrder()
    again = offers(order, 50)
    for _ in range(40):
        again()
    assert len(order._heap) <= 65
