"""The last minute, in slots: what happened in it, and how low something went.

A gauge that is looked at every few seconds misses what lay between; these do not, whoever looks
and how often.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

SLOTS = 6
SLOT_S = 10.0
"""The oldest slot leaves whole: a minute is 50 to 60 seconds."""


class MinuteCounts:
    """How often each key came within the last minute; a key that stays away is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots: deque[tuple[int, Counter[str]]] = deque()

    def add(self, key: str) -> None:
        """It came once more."""
        slot = self._current()
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append((slot, Counter()))
        self._slots[-1][1][key] += 1

    def totals(self) -> Counter[str]:
        """By key."""
        self._current()
        totals: Counter[str] = Counter()
        for _, counts in self._slots:
            totals.update(counts)
        return totals

    def _current(self) -> int:
        slot = int(self._clock() // SLOT_S)
        while self._slots and self._slots[0][0] <= slot - SLOTS:
            self._slots.popleft()
        return slot


class MinuteLow:
    """The lowest value within the last minute; the newest one when none came in it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots: deque[tuple[int, int]] = deque()
        self._newest = 0

    def note(self, value: int) -> None:
        """It stands at ``value`` now."""
        slot = int(self._clock() // SLOT_S)
        self._newest = value
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1] = slot, min(value, self._slots[-1][1])
            return
        self._slots.append((slot, value))
        while self._slots[0][0] <= slot - SLOTS:
            self._slots.popleft()

    def lowest(self) -> int:
        """Of the last minute."""
        slot = int(self._clock() // SLOT_S)
        return min((low for at, low in self._slots if at > slot - SLOTS), default=self._newest)
