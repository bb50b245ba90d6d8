"""Whom an engine's death is blamed on: sets of requests that run apart from everybody else.

    death among all        the requests of its step become a set
    death in a set         those of its step are halved
    a set got by           its requests join the others again

A request that kills every engine is found after about log2(n) + 3 deaths, n requests having been in
the step of the first, and nobody is found guilty whose neighbours may have done it: it takes two
deaths in steps where a request was alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

DEATHS_ALONE = 2
"""Engines that must die computing a request, and nothing else, for it to be called poison."""


class Suspects:
    """Sets of request ids, of at most ``most`` each; they are to run one set after the other, and
    before anybody else."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sets: list[list[str]] = []
        self._deaths: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._sets)

    def died(self, running: Sequence[str], *, beside: bool = False) -> str | None:
        """An engine died of a step in which ``running`` were computed, and ``beside`` them others:
        a canary, or who has left since. The request that is poison, if that is now known."""
        if not running:
            return None
        blamed = set(running)
        if not beside:
            self._deaths.update(blamed)
        if len(blamed) == 1 and not beside:
            self._alone[running[0]] += 1
            if self._alone[running[0]] >= DEATHS_ALONE:
                self._deaths.clear()  # it explains those of its neighbours too
                self._withdraw(blamed)
                return running[0]
        apart = bool(self._sets) and blamed <= set(self._sets[0])
        size = (len(running) + 1) // 2 if apart else min(self._most, len(running))
        self._withdraw(blamed)
        self._sets[:0] = [
            list(running[start : start + size]) for start in range(0, len(running), size)
        ]
        return None

    def next(self, unfinished: Container[str]) -> list[str]:
        """The set whose turn it is, without those that have ended; empty when there is none."""
        self._sets = [kept for each in self._sets if (kept := [r for r in each if r in unfinished])]
        for counts in (self._deaths, self._alone):
            for request_id in [r for r in counts if r not in unfinished]:
                del counts[request_id]
        return self._sets[0] if self._sets else []

    def passed(self) -> None:
        """The set whose turn it was has got by what an engine had died of."""
        del self._sets[0]

    def patience(self, request_id: str) -> int:
        """How many tokens the request has to make in its set to be let go: one at first, twice as
        many after every further death that no poison and nobody who has left explains, so that what
        kills later, or only in company, is apart for good in the end."""
        return int(2 ** max(0, self._deaths[request_id] - 1))

    def _withdraw(self, request_ids: set[str]) -> None:
        rest = ([r for r in each if r not in request_ids] for each in self._sets)
        self._sets = [each for each in rest if each]
