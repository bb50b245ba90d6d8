"""The last minute, on a clock that the test moves."""

from __future__ import annotations

from loramux.metrics.minute import SLOT_S, SLOTS, MinuteCounts, MinuteLow


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_came_within_the_minute_is_counted() -> None:
    clock = Clock()
    counts = MinuteCounts(clock)
    counts.add("a")
    clock.now += SLOT_S
    counts.add("a")
    counts.add("b")
    assert counts.totals() == {"a": 2, "b": 1}
    clock.now += SLOT_S * (SLOTS - 1)
    assert counts.totals() == {"a": 1, "b": 1}, "the first slot has left"
    clock.now += SLOT_S
    assert counts.totals() == {}
    counts.add("c")
    assert counts.totals() == {"c": 1}


def test_keys_that_stay_away_are_forgotten() -> None:
    clock = Clock()
    counts = MinuteCounts(clock)
    for number in range(20 * SLOTS):
        counts.add(str(number))
        clock.now += SLOT_S
    assert len(counts._slots) <= SLOTS and len(counts.totals()) < SLOTS


def test_a_dip_between_two_looks_is_seen_and_passes() -> None:
    clock = Clock()
    low = MinuteLow(clock)
    assert low.lowest() == 0
    for value in (50, 3, 40):
        low.note(value)
    assert low.lowest() == 3
    clock.now += SLOT_S * SLOTS
    assert low.lowest() == 40, "nothing was heard for a minute: what was heard last"
    low.note(60)
    assert low.lowest() == 60
    clock.now += SLOT_S
    low.note(45)
    assert low.lowest() == 45 and len(low._slots) == 2
