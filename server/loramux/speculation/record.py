"""How often guesses were right, by whose text it is, who guessed, how sure they were, and place.

Guesses that were not verified are compared with what came later: also a drafter whose guesses are
all cut shall be known.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from loramux.batch import depths
from loramux.request import Request
from loramux.sampling.verify import verified
from loramux.speculation.beliefs import Beliefs, Cells, Floats
from loramux.speculation.drafter import Guess

LONGEST = 64
"""Places of a guess that are told apart."""
PRIOR: Floats = 0.8 ** np.arange(1.0, LONGEST + 1)
"""How often the places of a guess are right, before anything was seen: too good rather than too
bad, since what is tried is found out."""
TRUST = 16.0
KNOWN = 50.0
"""Places that were seen less often may go on as the guess began: who is asked for little because
little is known of more would never know."""
WINDOW = 500.0


class Kind(NamedTuple):
    """Whose guesses are alike."""

    text: Hashable
    tree: bool


def kind_of(request: Request) -> Kind:
    """The kind of guesses at how ``request`` goes on."""
    speculation = request.speculation
    text = (request.kv.model_id, request.adapters)
    return Kind(text, speculation is not None and speculation.tree)


class Class(NamedTuple):
    """Guesses that are right equally often. The grade is known afterwards only; None is for those
    of all grades, by the places that were asked for and not those that were guessed."""

    kind: Kind
    drafter: str
    grade: int | None


class _Seen(NamedTuple):
    """Of the first ``length`` places of a guess, ``right`` (counted from 0) were."""

    of: Class
    length: int
    right: Sequence[int]


class _Shadow(NamedTuple):
    """A guess that was cut, at the ids ``since:until`` of its request."""

    since: int
    until: int
    of: Class
    guess: Guess
    asked_for: int | None


class Record:
    """What became of guesses. What is told counts from the next ``learn`` on."""

    def __init__(self) -> None:
        self._right = Beliefs(PRIOR, window=WINDOW, trust=TRUST)
        self._seen: list[_Seen] = []
        self._believed: dict[Class, Floats] = {}
        self._shadows: dict[str, _Shadow] = {}

    def survival(self, classes: Sequence[Class]) -> Floats:
        """How often each place of guesses of ``classes`` is right: [classes, LONGEST], never rising
        along a guess."""
        if missing := [of for of in dict.fromkeys(classes) if of not in self._believed]:
            cells = [self._cells(of) for of in missing]
            means = self._right.means(cells)
            for mean, count in zip(means, self._right.counts(cells), strict=True):
                if known := int(np.argmin(count >= KNOWN)):
                    each = max(mean[known - 1] ** (1 / known), PRIOR[0])
                    mean[known:] = mean[known - 1] * each ** np.arange(1, LONGEST - known + 1)
            falling = np.minimum.accumulate(means, axis=1)
            self._believed.update(zip(missing, falling, strict=True))
        return np.array([self._believed[of] for of in classes])

    def see(self, of: Class, length: int, nodes: Sequence[int], asked_for: int | None) -> None:
        """Of a guess of ``length`` tokens those were right that have ``nodes``. Where a number was
        ``asked_for``, a place that was not guessed was not right."""
        right = [node - 1 for node in nodes]
        self._seen.append(_Seen(of, length, right))
        if asked_for is not None:
            self._seen.append(_Seen(of._replace(grade=None), asked_for, right))

    def remember(self, request: Request, of: Class, guess: Guess, asked_for: int | None) -> bool:
        """Compare a guess that was cut with what will come, unless another at how ``request`` goes
        on is already waiting for that."""
        if request.id in self._shadows:
            return False
        until = request.num_ids + max(depths(len(guess.token_ids), guess.parents))
        self._shadows[request.id] = _Shadow(request.num_ids, until, of, guess, asked_for)
        return True

    def compare(self, requests: Sequence[Request]) -> None:
        """See what was remembered and would have been verified by now."""
        for request in requests if self._shadows else ():
            shadow = self._shadows.get(request.id)
            if shadow is not None and request.num_ids >= shadow.until:
                del self._shadows[request.id]
                token_ids, parents, _ = shadow.guess
                came = [*request.ids[shadow.since : shadow.until].tolist(), None]
                drawn = [came[depth] for depth in depths(len(token_ids), parents)]
                nodes = verified(token_ids, drawn, (), parents)[1:]
                self.see(shadow.of, len(token_ids), nodes, shadow.asked_for)

    def forget(self, request: Request) -> None:
        """``request`` is over: nothing more will come."""
        self._shadows.pop(request.id, None)

    def learn(self) -> None:
        """What was seen since the last time is believed from now on."""
        self._believed = {}
        if seen := self._seen:
            cells = {of: self._cells(of) for of in {of for of, _, _ in seen}}
            lengths = np.array([length for _, length, _ in seen])
            counts = (np.arange(LONGEST) < lengths[:, None]).astype(np.float64)
            sums = np.zeros_like(counts)
            for index, (_, _, right) in enumerate(seen):
                sums[index, right] = 1
            self._right.see([cells[of] for of, _, _ in seen], counts, sums)
            self._seen = []

    def _cells(self, of: Class) -> Cells:
        drafter = (of.drafter, of.kind.tree)
        return self._right.cells(of.kind, (drafter, of.grade), drafter)
