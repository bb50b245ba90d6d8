"""The fair order against the obvious one, and what it costs to ask."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.policy import INPUT_COST, FairOrder, Key
from loramux.request import AdapterRef, Request, SamplingParams


def request(name: str, key: int, num_prompt: int = 3) -> Request:
    return Request(
        name,
        prompt_ids=[1] * num_prompt,
        sampling=SamplingParams(seed=0, max_tokens=1),
        adapters=(AdapterRef(f"adapter {key}"),),
    )


def obvious_walk(order: FairOrder, lines: dict[Key, list[Request]], admit: set[str]) -> list:
    """All keys sorted anew for every step of the walk."""
    costs = {key: order.served[key] for key in lines}
    lines = {key: list(line) for key, line in lines.items()}
    turns = list(lines)
    walked = []
    while costs:
        key = min(costs, key=lambda key: (costs[key], turns.index(key)))
        first = lines[key].pop(0)
        walked.append(first.id)
        if first.id in admit and lines[key]:
            costs[key] += INPUT_COST * first.num_prompt
        else:
            del costs[key]
    return walked


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_walk_is_the_obvious_one(data: st.DataObject) -> None:
    order = FairOrder()
    lines: dict[Key, list[Request]] = {}
    running: list[Request] = []
    for serial in range(data.draw(st.integers(1, 25), label="events")):
        event = data.draw(st.sampled_from(["push", "push", "walk", "charge", "done", "preempt"]))
        if event == "push":
            new = request(f"r{serial}", data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)))
            order.push(new)
            lines.setdefault(new.fair_key, []).append(new)
        elif event == "walk":
            waiting = [r.id for line in lines.values() for r in line]
            admit = set(data.draw(st.lists(st.sampled_from(waiting)))) if waiting else set()
            expected = obvious_walk(order, lines, admit)
            most = data.draw(st.integers(0, len(expected)), label="walked")
            walked = []
            with closing(order.walk()) as walk:
                for met in islice(walk, most):
                    walked.append(met.id)
                    if met.id in admit:
                        order.remove(met)
                        lines[met.fair_key].remove(met)
                        if not lines[met.fair_key]:
                            del lines[met.fair_key]
                        running.append(met)
            assert walked == expected[:most]
        elif running and event == "charge":
            order.charge(data.draw(st.sampled_from(running)), inputs=3, outputs=2)
        elif running and event == "preempt":
            victim = running.pop()
            order.push_back(victim)
            lines.setdefault(victim.fair_key, []).insert(0, victim)
        elif running:
            order.done(running.pop())
        head = order.head()
        expected = obvious_walk(order, lines, set())
        assert (head and head.id) == (expected[0] if expected else None)
        assert len(order) == sum(map(len, lines.values()))


class Counting(dict[Key, float]):
    """Counts how often a counter is looked at."""

    looks = 0

    def __getitem__(self, key: Key) -> float:
        Counting.looks += 1
        return super().__getitem__(key)


def test_a_step_looks_at_as_many_keys_as_it_needs_however_many_wait() -> None:
    order = FairOrder()
    for key in range(1_000):
        order.push(request(f"r{key}", key))
    order.served = Counting(order.served)
    for _ in range(10):
        order.head()
        with closing(order.walk()) as walk:
            assert len(list(islice(walk, 8))) == 8
    assert Counting.looks < 10 * 8 * 4


def test_what_waiting_requests_need_is_told_apart_by_a_version() -> None:
    order = FairOrder()
    first, second = request("a", 1), request("b", 1)
    order.push(first)
    version = order.version
    order.push(second)
    assert order.version == version, "the same adapter"
    order.remove(first)
    assert order.version == version
    order.remove(second)
    assert order.version != version and order.digests() == []


def test_the_oldest_is_the_one_that_never_ran() -> None:
    order = FairOrder()
    assert order.oldest_arrival() is None
    first, second, other = request("first", 0), request("second", 0), request("other", 1)
    for arrival, new in enumerate((first, second, other), start=1):
        new.arrival = float(arrival)
        order.push(new)
    assert order.oldest_arrival() == 1.0
    order.remove(first)
    first.first_scheduled = 9.0
    assert order.oldest_arrival() == 2.0
    order.push_back(first)
    assert order.oldest_arrival() == 2.0, "it ran before it was preempted"
    order.remove(second)
    order.remove(other)
    assert order.oldest_arrival() is None
