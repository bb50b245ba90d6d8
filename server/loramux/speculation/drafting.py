"""A step's guesses: whom to ask, in which order, and how many of their guesses to verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from loramux.batch import Row
from loramux.request import Request
from loramux.speculation.costs import Load
from loramux.speculation.drafter import Ask, Drafter, Guess
from loramux.speculation.planner import Answer, Chain, Planner


class Draft(NamedTuple):
    """What to verify, and whose it is."""

    drafter: str
    guess: Guess


class Drafting:
    """The ``drafters`` of an engine by name, each asked as long as ``planner`` finds it worth its
    time; without one always, and everything they say is verified."""

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        planner: Planner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafters = dict(drafters)
        self.planner = planner
        self._clock = clock

    def propose(self, asks: Sequence[Ask], load: Load) -> list[Draft | None]:
        """For each of ``asks`` the guess of the first of its request's drafters that has one, as
        far as it pays and what is left of the step's tokens goes."""
        drafts: list[Draft | None] = [None] * len(asks)
        open_asks = [index for index, ask in enumerate(asks) if min(ask.most, load.budget) > 0]
        if not open_asks:
            return drafts
        began = self._clock()
        answers = self._ask(asks, open_asks, self._chains([asks[i] for i in open_asks], load))
        if self.planner is not None and answers:
            numbers = self.planner.choose(answers, load, self._clock() - began)
        else:
            numbers = [len(answer.guess.token_ids) for answer in answers]
        budget = load.budget
        for answer, number in zip(answers, numbers, strict=True):
            number = min(number, budget)
            budget -= number
            if number:
                drafts[answer.number] = Draft(answer.drafter, _beginning(answer.guess, number))
        return drafts

    def learned(self, row: Row, nodes: Sequence[int]) -> None:
        """Of the guesses of ``row`` those at ``nodes`` were right."""
        if self.planner is not None:
            self.planner.learned(row, nodes)

    def ended(self, request: Request) -> None:
        """``request`` is over."""
        for drafter in self.drafters.values():
            drafter.ended(request)
        if self.planner is not None:
            self.planner.ended(request)

    def _chains(self, asks: Sequence[Ask], load: Load) -> Sequence[Chain]:
        if self.planner is not None:
            return self.planner.chains(asks, load, self.drafters)
        return [tuple((name, ask.most) for name in _drafters(ask)) for ask in asks]

    def _ask(
        self, asks: Sequence[Ask], indices: Sequence[int], chains: Sequence[Chain]
    ) -> list[Answer]:
        """Every answer to the asks at ``indices``, in whose chains the next is asked when one has
        none."""
        answers: list[Answer] = []
        unanswered = list(zip(indices, chains, strict=True))
        place = 0
        while unanswered := [each for each in unanswered if place < len(each[1])]:
            by_name: dict[str, list[tuple[int, Chain]]] = {}
            for each in unanswered:
                by_name.setdefault(each[1][place][0], []).append(each)
            unanswered = []
            for name, those in by_name.items():
                now = [asks[index]._replace(most=chain[place][1]) for index, chain in those]
                for each, ask, guess in zip(those, now, self._timed(name, now), strict=True):
                    index = each[0]
                    guess = _beginning(guess, ask.most)
                    answers.append(Answer(index, ask, name, guess, asks[index].most))
                    if not guess.token_ids:
                        unanswered.append(each)
            place += 1
        return sorted(answers, key=lambda answer: answer.number)

    def _timed(self, name: str, asks: Sequence[Ask]) -> Sequence[Guess]:
        began = self._clock()
        guesses = self.drafters[name].propose(asks)
        if self.planner is not None:
            self.planner.took(name, len(asks), self._clock() - began)
        return guesses


def _drafters(ask: Ask) -> Sequence[str]:
    assert ask.request.speculation is not None
    return ask.request.speculation.drafters


def _beginning(guess: Guess, number: int) -> Guess:
    """The first ``number`` tokens of ``guess``. A tree that does not branch is a chain, which is
    cheaper."""
    token_ids, parents, grade = guess
    token_ids = token_ids[:number]
    if parents is not None:
        parents = parents[: len(token_ids)]
        if list(parents) == list(range(len(parents))):
            parents = None
    return Guess(token_ids, parents, grade)
