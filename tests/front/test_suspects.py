"""Who is blamed: found within the promised number of deaths, and never a neighbour."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.front.suspects import Suspects


@dataclass
class Machine:
    """An engine that dies when a set that ``kills`` (all of it together) is in a step; requests
    that have been tried often enough are done."""

    requests: list[str]
    kills: list[set[str]]
    most: int = 64
    made: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    deaths: int = 0
    tokens: int = 1000

    def run(self) -> None:
        self.suspects = Suspects(self.most)
        while unfinished := [r for r in self.requests if self.made.get(r, 0) < self.tokens]:
            apart = self.suspects.next(unfinished)
            running = (apart or unfinished)[: self.most]
            wanted = {r: self.made.get(r, 0) + self.suspects.patience(r) for r in apart}
            while self.step(running):
                if apart and all(self.made[r] >= min(self.tokens, n) for r, n in wanted.items()):
                    self.suspects.passed()
                    break
                if not apart and all(self.made[r] >= self.tokens for r in running):
                    break

    def step(self, running: list[str]) -> bool:
        unfinished = [r for r in running if self.made.get(r, 0) < self.tokens]
        if any(kill <= set(unfinished) for kill in self.kills):
            self.deaths += 1
            if poison := self.suspects.died(unfinished):
                self.failed.append(poison)
                self.requests.remove(poison)
            return False
        for request in unfinished:
            self.made[request] = self.made.get(request, 0) + 1
        return True


@pytest.mark.parametrize("place", [0, 1, 15, 16, 30, 31])
def test_the_poison_among_32_is_found_alone_and_in_time(place: int) -> None:
    names = [f"r{i}" for i in range(32)]
    machine = Machine(list(names), [{names[place]}])
    machine.run()
    assert machine.failed == [names[place]]
    assert machine.deaths <= 8, "log2(32) + 3"


@given(st.integers(1, 70), st.sets(st.integers(0, 69), max_size=3), st.sampled_from([4, 64]))
def test_exactly_the_guilty_are_failed(num: int, guilty: set[int], most: int) -> None:
    names = [f"r{i}" for i in range(num)]
    bad = [names[place] for place in guilty if place < num]
    machine = Machine(list(names), [{name} for name in bad], most, tokens=5)
    machine.run()
    assert sorted(machine.failed) == sorted(bad)
    assert machine.deaths <= len(bad) * (math.ceil(math.log2(max(2, min(num, most)))) + 3)


@given(st.integers(2, 40), st.sampled_from([8, 100, 1000]))
def test_two_that_kill_only_together_are_kept_apart_and_both_end(num: int, tokens: int) -> None:
    names = [f"r{i}" for i in range(num)]
    machine = Machine(list(names), [{names[0], names[-1]}], tokens=tokens)
    machine.run()
    assert machine.failed == []
    assert machine.deaths <= 4 * (math.log2(tokens) + math.log2(num) + 4)


def test_one_death_alone_is_no_proof() -> None:
    suspects = Suspects(64)
    assert suspects.died(["a"]) is None
    assert suspects.next(["a", "b"]) == ["a"]
    suspects.passed()
    assert suspects.next(["a", "b"]) == []
    assert suspects.died(["b"]) is None
    assert suspects.died(["a"]) == "a"


def test_nobody_is_blamed_for_what_nobody_did() -> None:
    suspects = Suspects(64)
    assert suspects.died([]) is None and not suspects.next(["a"])


def test_who_has_ended_is_no_suspect_any_more() -> None:
    suspects = Suspects(64)
    suspects.died(["a", "b", "c"])
    assert suspects.next(["b", "c", "d"]) == ["b", "c"]
    assert suspects.next(["d"]) == []


def test_sets_are_no_larger_than_a_batch() -> None:
    suspects = Suspects(2)
    suspects.died(["a", "b", "c", "d", "e"])
    seen = []
    while each := suspects.next("abcde"):
        seen.append(each)
        suspects.passed()
    assert seen == [["a", "b"], ["c", "d"], ["e"]]


def test_a_death_beside_one_that_has_left_proves_nothing() -> None:
    suspects = Suspects(64)
    for _ in range(5):
        assert suspects.died(["a"], beside=True) is None
        assert suspects.next(["a"]) == ["a"] and suspects.patience("a") == 1
