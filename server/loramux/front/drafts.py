"""What became of guesses: how many were verified, and how many of them were right and delivered."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

SEATS = 20
"""How many adapters are counted apart at a time."""
_MOST_DIGESTS = 1000


@dataclass(slots=True)
class Drafted:
    """``steps`` that verified guesses, the tokens ``drafted`` for them, and those ``accepted``."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """One more step."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted


@dataclass(slots=True)
class DrafterTotals(Drafted):
    """``depths[n]``: steps with guesses for n positions; ``runs[n]``: for the first n of which they
    were right. A tree has several guesses for a position."""

    depths: dict[int, int] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class DraftTotals:
    """All guesses since the front started, by drafter and by adapter; every count only grows.

    An adapter (its digest; "" is the base) is counted apart, in ``by_adapter[digest][drafter]``,
    while it has one of SEATS ``seats``, and in ``others[drafter]`` while it has none. Who sits is
    decided anew by ``reseat``: the busiest of the first 1000, by the tokens guessed for them
    (``busy``). What one has counted waits for its return.
    """

    by_drafter: dict[str, DrafterTotals] = field(default_factory=dict)
    others: dict[str, Drafted] = field(default_factory=dict)
    by_adapter: dict[str, dict[str, Drafted]] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    seats: set[str] = field(default_factory=set)

    @property
    def seated(self) -> dict[str, dict[str, Drafted]]:
        """The adapters that are counted apart now."""
        return {digest: self.by_adapter.get(digest, {}) for digest in self.seats}

    def add(self, digest: str, drafter: str, num: int, depth: int, accepted: int) -> None:
        """``num`` guesses for ``depth`` positions were verified, the first ``accepted`` right."""
        if (totals := self.by_drafter.get(drafter)) is None:
            totals = self.by_drafter[drafter] = DrafterTotals()
        totals.add(num, accepted)
        totals.depths[depth] = totals.depths.get(depth, 0) + 1
        totals.runs[accepted] = totals.runs.get(accepted, 0) + 1
        line = self._line(digest, num)
        if (counts := line.get(drafter)) is None:
            counts = line[drafter] = Drafted()
        counts.add(num, accepted)

    def _line(self, digest: str, num: int) -> dict[str, Drafted]:
        if digest in self.busy:
            self.busy[digest] += num
        elif len(self.busy) < _MOST_DIGESTS:
            self.busy[digest] = num
            if len(self.seats) < SEATS:
                self.seats.add(digest)
        if digest not in self.seats:
            return self.others
        if (line := self.by_adapter.get(digest)) is None:
            line = self.by_adapter[digest] = {}
        return line

    def reseat(self) -> None:
        """Give the seats to the busiest; of equals, to who sits."""
        if len(self.busy) > SEATS:
            busiest = heapq.nlargest(
                SEATS, self.busy, key=lambda digest: (self.busy[digest], digest in self.seats)
            )
            self.seats = set(busiest)
