"""What asking a drafter would bring, and what it would take, at every price of a token.

A guess is verified when it is likely enough to be worth its place in a step: that is its price, in
tokens. A low price lets more of a guess through, more of it wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from loramux.speculation.beliefs import Beliefs, Cells, Floats
from loramux.speculation.drafter import Ask, Drafter
from loramux.speculation.record import LONGEST, PRIOR, Class, Kind, Record, kind_of

PRICES = np.array([0, 0.02, *np.arange(0.05, 0.925, 0.05)])
TRUST = 1.0
WINDOW = 16
USUAL_MOST = 8


@runtime_checkable
class Priced(Protocol):
    """A drafter that knows what it takes, and takes more the more it is asked for. That of others
    is measured, and taken to be the same for every request."""

    def seconds(self, rows: int, most: int) -> float:
        """For guesses of ``most`` tokens at how ``rows`` requests go on."""
        ...


class Group(NamedTuple):
    """Asks that are decided together."""

    kind: Kind
    drafters: tuple[str, ...]
    most: int

    @classmethod
    def of(cls, ask: Ask) -> Group:
        """The group of ``ask``."""
        speculation = ask.request.speculation
        assert speculation is not None
        most = min(speculation.max_draft_tokens, LONGEST)
        return cls(kind_of(ask.request), ask.drafters, most)

    def is_like(self, other: Group) -> bool:
        """They differ in whose text it is only."""
        return self._replace(kind=other.kind) == other and self.kind.tree == other.kind.tree


class Table(NamedTuple):
    """Of asking the drafter at each place of the chains of some groups, [places, groups, prices]:
    ``tokens`` to verify, how many of them are ``right``, how often there are ``answers``, the
    ``seconds`` it takes, and the ``depth`` to ask for. All 0 where a chain has no such place."""

    tokens: Floats
    right: Floats
    answers: Floats
    seconds: Floats
    depth: Floats


class Duration:
    """How long something takes, on the mean of late. A first time may wait for a compiler, any for
    another program: what is not usual does not count for more than a few."""

    FIRST = 4

    def __init__(self) -> None:
        self.mean = 0.0
        self._first: list[float] = []

    def took(self, seconds: float) -> None:
        if len(self._first) < self.FIRST:
            self._first.append(seconds)
            self.mean = min(self._first) if len(self._first) == self.FIRST else 0.0
        else:
            self.mean += (min(seconds, 4 * self.mean) - self.mean) / 16


class Prospects:
    """What ``drafters`` bring, going by what those who asked them were brought and by the
    ``record`` of their guesses."""

    def __init__(self, record: Record) -> None:
        self._record = record
        usual = _brought(PRIOR[None, :USUAL_MOST])[0]
        self._asked = Beliefs(usual, window=WINDOW, trust=TRUST)
        # of older ones nothing would be left
        self._brought = defaultdict[tuple[Kind, str], deque[Floats]](lambda: deque(maxlen=WINDOW))
        self._durations: dict[str, Duration] = {}
        self.priced: dict[str, Priced] = {}

    def offered(self, drafters: Mapping[str, Drafter]) -> None:
        """Who may be asked."""
        self.priced = {name: it for name, it in drafters.items() if isinstance(it, Priced)}

    def took(self, drafter: str, rows: int, seconds: float) -> None:
        """``drafter`` was asked about ``rows`` requests, which took ``seconds``."""
        self._durations.setdefault(drafter, Duration()).took(seconds / rows)

    def seconds(self, drafter: str, rows: int, most: int) -> float:
        """Of asking ``drafter`` about ``rows`` requests, for ``most`` tokens each."""
        if drafter in self.priced:
            return self.priced[drafter].seconds(rows, most)
        return rows * self._durations[drafter].mean if drafter in self._durations else 0.0

    def see(self, of: Class, survival: Floats) -> None:
        """An ask brought a guess whose places are right as often as ``survival`` says."""
        self._brought[of.kind, of.drafter].append(survival)

    def learn(self) -> None:
        """What was seen since the last time is believed from now on."""
        if self._brought:
            seen = [(of, row) for of, rows in self._brought.items() for row in rows]
            survival = np.zeros((len(seen), max(1, *(len(row) for _, row in seen))))
            for index, (_, row) in enumerate(seen):
                survival[index, : len(row)] = row
            brought = _brought(survival)
            self._asked.see([self._cells(*of) for of, _ in seen], np.ones_like(brought), brought)
            self._brought.clear()

    def table(self, groups: Mapping[Group, int]) -> Table:
        """For ``groups`` and how many asks are in each."""
        places = max(len(group.drafters) for group in groups)
        rows: Counter[str] = Counter()
        for group, number in groups.items():
            rows.update(dict.fromkeys(group.drafters, number))
        entries = [(g, place, name) for g in groups for place, name in enumerate(g.drafters)]
        means = self._asked.means([self._cells(group.kind, name) for group, _, name in entries])
        shape = (len(entries), len(PRICES))
        found = np.zeros((5, *shape))
        found[0], found[1] = means[:, : len(PRICES)], means[:, len(PRICES) : -1]
        found[2] = means[:, -1:]
        found[4] = np.array([group.most for group, _, _ in entries])[:, None]
        for name in rows:
            those = np.array([i for i, entry in enumerate(entries) if entry[2] == name])
            if name in self.priced:
                self._price(found, those, [entries[i][0] for i in those], name, rows[name])
            else:
                found[3, those] = self.seconds(name, 1, 1)
        table = np.zeros((5, places, len(groups), len(PRICES)))
        index_of = {group: index for index, group in enumerate(groups)}
        where = [place for _, place, _ in entries], [index_of[group] for group, _, _ in entries]
        table[:, *where] = found
        return Table(*table)

    def _price(
        self, found: Floats, those: np.ndarray, groups: Sequence[Group], name: str, rows: int
    ) -> None:
        """Where more takes longer it is not known what more would have brought: that follows from
        how often guesses are right, and more is asked for only as far as it is worth the price."""
        ahead = self._record.survival([Class(group.kind, name, None) for group in groups])
        most = np.array([group.most for group in groups])
        ahead = ahead * (np.arange(LONGEST) < most[:, None])
        brought = _brought(ahead) * found[2, those][:, :1]
        found[0, those], found[1, those] = np.split(brought[:, :-1], 2, axis=1)
        depth = np.maximum(1, (ahead[:, :, None] > PRICES).sum(1))
        each = [self.seconds(name, rows, upto) / rows for upto in range(1, int(depth.max()) + 1)]
        found[3, those], found[4, those] = np.array(each)[depth - 1], depth

    def _cells(self, kind: Kind, drafter: str) -> Cells:
        return self._asked.cells(kind, (drafter, kind.tree))


def _brought(survival: Floats) -> Floats:
    """At each of PRICES, the tokens of guesses [guesses, places] that are worth it and how many of
    them will be right, and whether there was a guess at all: [guesses, 2 * prices + 1]."""
    worth = survival[:, :, None] > PRICES
    right = (survival[:, :, None] * worth).sum(1)
    return np.concatenate([worth.sum(1), right, survival[:, :1] > 0], axis=1)
