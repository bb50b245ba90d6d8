"""A step's guesses: whom to ask, in which order, and how many of their guesses to verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loramux.batch import Row
from loramux.request import Request
from loramux.speculation.costs import Load
from loramux.speculation.drafter import Ask, Drafter, Guess
from loramux.speculation.planner import Answer, Chain, Planner, Question

if TYPE_CHECKING:
    import torch


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
        self._began: float | None = None
        self._asked_s = 0.0

    def rests(self, load: Load) -> bool:
        """In this step, of ``load``, nobody is to be asked. To be called once a batch, first."""
        self._began, self._asked_s = self._clock(), 0.0
        return self.planner is not None and self.planner.rests(load)

    def stepped(self, *, alone: bool = True) -> None:
        """The step is committed. What a model's rows took can be told if it was ``alone`` in it."""
        began, self._began = self._began, None
        if self.planner is not None and began is not None and alone:
            self.planner.stepped(self._clock() - began - self._asked_s, self._asked_s)

    def propose(self, asks: Sequence[Ask], load: Load) -> list[Draft | None]:
        """For each of ``asks`` the guess of the first of its request's drafters that has one, as
        far as it pays and what is left of the step's tokens goes."""
        drafts: list[Draft | None] = [None] * len(asks)
        where = [index for index, ask in enumerate(asks) if min(ask.most, load.budget) > 0]
        if not where:
            return drafts
        began = self._clock()
        answers = self._answers([asks[index] for index in where], load)
        numbers = [len(answer.guess.token_ids) for answer in answers]
        if self.planner is not None and answers:
            numbers = self.planner.choose(answers, load, self._clock() - began)
        if self.planner is not None:
            self.planner.proposed(self._clock() - began - self._asked_s, self._asked_s)
        budget = load.budget
        for answer, number in zip(answers, numbers, strict=True):
            if number := min(number, budget):
                budget -= number
                guess = _beginning(answer.guess, number)
                drafts[where[answer.number]] = Draft(answer.drafter, guess)
        return drafts

    def learned(self, row: Row, nodes: Sequence[int]) -> None:
        """Of the guesses of ``row`` those at ``nodes`` were right."""
        if self.planner is not None:
            self.planner.learned(row, nodes)

    def reads(self, request: Request) -> bool:
        """One of the request's drafters is a HiddenReader, and may be asked in the next step."""
        speculation = request.speculation
        if speculation is None or (self.planner is not None and not self.planner.wakes):
            return False
        return any(hasattr(self.drafters[name], "saw") for name in speculation.drafters)

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        """See HiddenReader."""
        for drafter in self.drafters.values():
            if hasattr(drafter, "saw"):  # isinstance of a protocol takes longer than a guess
                drafter.saw(requests, hidden)

    def ended(self, request: Request) -> None:
        """``request`` is over."""
        for drafter in self.drafters.values():
            drafter.ended(request)
        if self.planner is not None:
            self.planner.ended(request)

    def _answers(self, asks: Sequence[Ask], load: Load) -> list[Answer]:
        """What there is to choose from."""
        if self.planner is None:
            return self._ask(asks, [[(name, ask.most) for name in ask.drafters] for ask in asks])
        chains = self.planner.chains(asks, load, self.drafters)
        probes = self.planner.probes(asks, chains, load)
        return self._ask(asks, chains) + self._put(asks, probes, probe=True)

    def _ask(self, asks: Sequence[Ask], chains: Sequence[Chain]) -> list[Answer]:
        """Every answer to ``asks``, in whose chains the next is asked when one has none."""
        answers: list[Answer] = []
        unanswered, place = list(range(len(asks))), 0
        while unanswered := [number for number in unanswered if place < len(chains[number])]:
            now = self._put(asks, [Question(n, *chains[n][place]) for n in unanswered])
            answers += now
            unanswered = [answer.number for answer in now if not answer.guess.token_ids]
            place += 1
        return sorted(answers, key=lambda answer: answer.number)

    def _put(
        self, asks: Sequence[Ask], questions: Sequence[Question], *, probe: bool = False
    ) -> list[Answer]:
        """The answers to ``questions``, every drafter's at once."""
        answers: list[Answer] = []
        for name in dict.fromkeys(question.drafter for question in questions):
            those = [question for question in questions if question.drafter == name]
            now = [asks[question.number]._replace(most=question.most) for question in those]
            began = self._clock()
            guesses = self.drafters[name].propose(now)
            took_s = self._clock() - began
            self._asked_s += took_s
            if self.planner is not None:
                self.planner.took(name, len(now), took_s)
            for (number, _, most), ask, guess in zip(those, now, guesses, strict=True):
                guess = _beginning(guess, most)
                answers.append(Answer(number, ask, name, guess, probe))
        return answers


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
