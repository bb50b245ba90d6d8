"""How far to guess: as far as tokens come faster by it.

What counts is goodput, the expected tokens of a step over its seconds (SmartSpec, arXiv
2406.14066), never the share of guesses that are right: that is the same for one request, where a
guess is free, and for forty, where each takes the place of a token. Every step

1. decides who is asked, and for how much (``chains``): a drafter's time may be worth more than its
   guesses, or those of the next one;
2. has the guesses, and cuts them (``choose``): the likeliest of all rows, as many as pay.

A guess is likely when guesses like it were right (``Beliefs``): for these adapters, by this
drafter, of this grade, at this place. Guesses that are not verified are compared with what came
later, so that also a drafter whose guesses are all cut has its chance. Whoever is not asked is
probed now and then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from loramux.batch import Row, depths
from loramux.request import Request
from loramux.sampling.verify import verified
from loramux.speculation.beliefs import Beliefs, Cells, Floats
from loramux.speculation.costs import Costs, Load
from loramux.speculation.drafter import Ask, Drafter, Guess

PASSES = 3
"""What time is worth depends on what is done with it: so often that is gone through."""
MARGIN = 1.05
"""How much faster than without guesses a step must promise to be."""
LONGEST = 64
"""Places of a guess that are told apart."""
PRIOR: Floats = 0.8 ** np.arange(1.0, LONGEST + 1)
"""How often the places of a guess are right, before anything was seen: too good rather than too
bad, since what is tried is found out."""
TRUST = 50.0
WINDOW = 500.0
PRICES = np.array([0, 0.02, *np.arange(0.05, 0.925, 0.05)])
"""How likely a guess must be to be worth it: what it takes of a step, in tokens."""
ASKS_TRUST = 1.0
ASKS_WINDOW = 16.0
USUAL_MOST = 8
PLAN_STEPS = 32
"""So long who is asked stays decided while the load is about the same: planning takes longer than
a step of a small model."""
BROUGHT_STEPS = 2
"""What an ask brings is counted so often: that takes time too."""
PROBE_SHARE = 0.005
"""Of the time of plain steps, for asking those who are not worth it, in case they are by now."""
PROBE_MOST = 2
"""Tokens that those are asked for who take longer for more."""
PROBE_STEPS = 8
"""So often at most: planning a probe takes time too."""
SAVED_STEPS = 2.0
"""Steps' worth of unused time for probes that is kept."""


@runtime_checkable
class Priced(Protocol):
    """A drafter that knows what it takes, and takes more the more it is asked for. That of others
    is measured, and taken to be the same for every request."""

    def seconds(self, rows: int, most: int) -> float:
        """For guesses of ``most`` tokens at how ``rows`` requests go on."""
        ...


class Answer(NamedTuple):
    """``drafter`` was asked ``ask``, the ``number``-th of a step. If that was a ``probe``, none of
    the guess is verified."""

    number: int
    ask: Ask
    drafter: str
    guess: Guess
    probe: bool = False


class Question(NamedTuple):
    """``drafter`` shall be asked about the ``number``-th ask of a step, for ``most`` tokens."""

    number: int
    drafter: str
    most: int


Chain = Sequence[tuple[str, int]]
"""Drafters in the order they are asked, and for how many tokens at most."""


class _Kind(NamedTuple):
    """Whose guesses are alike."""

    text: Hashable
    tree: bool


class _Group(NamedTuple):
    """Asks that are decided together."""

    kind: _Kind
    drafters: tuple[str, ...]
    most: int

    def is_like(self, other: _Group) -> bool:
        """They differ in whose text it is only."""
        return self._replace(kind=other.kind) == other and self.kind.tree == other.kind.tree


class _Class(NamedTuple):
    """Guesses that are right equally often. One who takes longer for more has a class of all its
    grades too, None: the grade is known only afterwards."""

    kind: _Kind
    drafter: str
    grade: int | None


class _Seen(NamedTuple):
    """Of the first ``length`` places of a guess, ``right`` (counted from 0) were."""

    of: _Class
    length: int
    right: Sequence[int]


class _Shadow(NamedTuple):
    """A guess that was cut, at the ids ``since:until`` of its request."""

    since: int
    until: int
    of: _Class
    guess: Guess
    asked_for: int


class _Asked:
    """What was brought by the asks of each kind at each of PRICES: tokens and how many of them were
    right, and how often there was an answer."""

    def __init__(self) -> None:
        usual = _brought(PRIOR[None, :USUAL_MOST])[0]
        self._beliefs = Beliefs(usual, window=ASKS_WINDOW, trust=ASKS_TRUST)

    def of(self, kind: _Kind, drafter: str) -> Cells:
        return self._beliefs.cells(kind, (drafter, kind.tree))

    def means(self, classes: Sequence[Cells]) -> tuple[Floats, Floats, Floats]:
        """Tokens and right ones [classes, prices], answers [classes, 1]."""
        means = self._beliefs.means(classes)
        return means[:, : len(PRICES)], means[:, len(PRICES) : -1], means[:, -1:]

    def see(self, classes: Sequence[Cells], brought: Floats) -> None:
        self._beliefs.see(classes, np.ones_like(brought), brought)


class _Seconds:
    """What an ask takes, on the mean of late. A first one may wait for a compiler, any for another
    program: what is not usual does not count for more than a few."""

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


class Planner:
    """Chooses what to guess in steps that cost what ``costs`` says."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._right = Beliefs(PRIOR, window=WINDOW, trust=TRUST)
        self._asked = _Asked()
        self._priced: dict[str, Priced] = {}
        self._seconds: dict[str, _Seconds] = {}
        self._seen: list[_Seen] = []
        self._brought: list[tuple[_Class, Floats]] = []
        self._believed: dict[_Class, Floats] = {}
        self._shadows: dict[str, _Shadow] = {}
        self._verified: dict[str, int] = {}
        self._planned: dict[_Group, Chain] = {}
        self._planned_for: tuple[int, int, int] | None = None
        self._steps_left = 0
        self._credit_s = 0.0
        self._turn = 0

    # -- before drafting -------------------------------------------------------------------------

    def chains(
        self, asks: Sequence[Ask], load: Load, drafters: Mapping[str, Drafter]
    ) -> list[Chain]:
        """For each of ``asks``: which of its request's ``drafters`` to ask."""
        self._compare(asks)
        groups = [_group(ask) for ask in asks]
        now = (len(asks).bit_length(), load.rows.bit_length(), load.tokens.bit_length())
        if self._steps_left == 0 or now != self._planned_for or not self._knows(groups):
            self._learn()
            self._priced = {k: v for k, v in drafters.items() if isinstance(v, Priced)}
            self._planned = self._plan(Counter(groups), load)
            self._planned_for, self._steps_left = now, PLAN_STEPS
        self._steps_left -= 1
        return [
            [(name, min(most, ask.most)) for name, most in self._planned[group]]
            for group, ask in zip(groups, asks, strict=True)
        ]

    def _knows(self, groups: Sequence[_Group]) -> bool:
        """There is a plan for each of ``groups``: its own, or until the next time that of another
        with the same drafters, since requests of new adapters come at any step."""
        for group in groups:
            if group not in self._planned:
                other = next((known for known in self._planned if known.is_like(group)), None)
                if other is None:
                    return False
                self._planned[group] = self._planned[other]
        return True

    def took(self, drafter: str, rows: int, seconds: float) -> None:
        """``drafter`` was asked about ``rows`` requests, which took ``seconds``."""
        self._seconds.setdefault(drafter, _Seconds()).took(seconds / rows)

    def _plan(self, groups: Counter[_Group], load: Load) -> dict[_Group, Chain]:
        """Whom to ask at the price that promises the most. Where a drafter has no answer the next
        is asked, so of a chain those are kept that bring more than what comes after them would."""
        kinds, times = list(groups), np.array(list(groups.values()))
        rows = Counter(name for group in groups.elements() for name in group.drafters)
        plain = load.rows / self.costs.without_guesses(load)
        costs = self.costs.with_guesses(load)
        rate, price, each_s = plain, 0, np.zeros(len(PRICES))
        for _ in range(PASSES):
            worth, kept = self._worth(kinds, rows, rate, each_s)
            tokens, right, seconds = np.tensordot(times, worth, (0, 1))
            taken = np.interp(tokens, np.arange(len(costs)), costs)
            each_s = (taken - costs[0]) / np.maximum(tokens, 1)
            fits = np.minimum(1, load.budget / np.maximum(tokens, 1))
            goodput = np.where(tokens > 0, load.rows + right * fits, 0) / (taken + seconds)
            price = int(np.argmax(goodput))
            rate = max(plain, float(goodput[price]))
        if rate <= MARGIN * plain:
            return dict.fromkeys(kinds, ())
        return {
            group: [
                (name, self._depth(group, name, price))
                for place, name in enumerate(group.drafters)
                if kept[place][index, price]
            ]
            for index, group in enumerate(kinds)
        }

    def _worth(
        self, groups: Sequence[_Group], rows: Mapping[str, int], rate: float, each_s: Floats
    ) -> tuple[Floats, list[npt.NDArray[np.bool_]]]:
        """At each of PRICES, while a second is worth ``rate`` tokens and verifying one takes
        ``each_s`` [prices]: [tokens, right ones, seconds] of each group's ask [3, groups, prices],
        and, by place in their chains, who is kept [groups, prices]."""
        worth = np.zeros((3, len(groups), len(PRICES)))
        surplus = np.zeros((len(groups), len(PRICES)))
        kept = []
        for place in reversed(range(max(len(group.drafters) for group in groups))):
            those = [i for i, group in enumerate(groups) if place < len(group.drafters)]
            asked = [(groups[i], groups[i].drafters[place]) for i in those]
            tokens, right, answers = self._brings(asked)
            seconds = np.array([self._price(*each, rows[each[1]]) for each in asked])
            own = right - rate * (seconds + each_s * tokens)
            keep = (own > 0) & (MARGIN * own >= answers * surplus[those])
            kept.append(np.zeros((len(groups), len(PRICES)), np.bool_))
            kept[-1][those] = keep
            rest = 1 - answers
            surplus[those] = np.where(keep, own + rest * surplus[those], surplus[those])
            brings = np.stack([tokens, right, seconds])
            worth[:, those] = np.where(keep, brings + rest * worth[:, those], worth[:, those])
        return worth, kept[::-1]

    def _brings(self, asked: Sequence[tuple[_Group, str]]) -> tuple[Floats, Floats, Floats]:
        """See _Asked.means. Of those who take longer for more it is not known what more would have
        brought: that follows from how often they are right."""
        means = self._asked.means([self._asked.of(group.kind, name) for group, name in asked])
        tokens, right, answers = means
        for index, (group, name) in enumerate(asked):
            if name in self._priced:
                brought = _brought(self._ahead(group, name)[None])[0] * answers[index]
                tokens[index], right[index] = np.split(brought[:-1], 2)
        return means

    def _price(self, group: _Group, name: str, rows: int) -> Floats:
        """Seconds of one of ``rows`` asks at each of PRICES."""
        if name not in self._priced:
            return np.full(len(PRICES), self._each_s(name))
        seconds = self._priced[name].seconds
        most = [self._depth(group, name, price) for price in range(len(PRICES))]
        return np.array([seconds(rows, each) / rows for each in most])

    def _each_s(self, name: str) -> float:
        return self._seconds[name].mean if name in self._seconds else 0.0

    def _depth(self, group: _Group, name: str, price: int) -> int:
        """How much to ask for: where it costs nothing more, for all that a guess may have."""
        if name not in self._priced:
            return group.most
        return max(1, int((self._ahead(group, name) > PRICES[price]).sum()))

    def _ahead(self, group: _Group, name: str) -> Floats:
        """How often each place that is asked for is guessed, and right."""
        return self._survival([_Class(group.kind, name, None)])[0, : group.most]

    def probes(self, asks: Sequence[Ask], chains: Sequence[Chain], load: Load) -> list[Question]:
        """Which of those that ``chains`` leave out to ask about ``asks`` nevertheless, if there is
        time for one: about as many requests as there is time for."""
        plain_s = self.costs.without_guesses(load)
        self._credit_s += PROBE_SHARE * plain_s
        self._turn += 1
        if self._turn % PROBE_STEPS:
            return []
        names = Counter(
            name for each in zip(asks, chains, strict=True) for name in _left_out(*each)
        )
        if not names:
            self._credit_s = min(self._credit_s, SAVED_STEPS * plain_s)
            return []
        name = sorted(names)[self._turn // PROBE_STEPS % len(names)]
        most, rows, seconds = LONGEST, names[name], 0.0
        if name in self._priced:
            most, seconds = PROBE_MOST, self._priced[name].seconds(rows, PROBE_MOST)
        elif each_s := self._each_s(name):
            rows = min(rows, max(1, int(self._credit_s / each_s)))
            seconds = rows * each_s
        if seconds > self._credit_s:
            return []
        self._credit_s = min(self._credit_s - seconds, SAVED_STEPS * plain_s)
        order = [(self._turn + i) % len(asks) for i in range(len(asks))]
        those = [i for i in order if name in _left_out(asks[i], chains[i])][:rows]
        return [Question(i, name, min(most, asks[i].most)) for i in those]

    # -- after drafting --------------------------------------------------------------------------

    def choose(self, answers: Sequence[Answer], load: Load, spent: float) -> list[int]:
        """How many tokens of each guess to verify. ``spent`` is the time that they took."""
        classes = [_Class(_kind(a.ask.request), a.drafter, a.guess.grade) for a in answers]
        survival = self._survival(classes)
        lengths = np.array([0 if a.probe else len(a.guess.token_ids) for a in answers])
        places = np.arange(LONGEST)
        for answer, of, right in zip(answers, classes, survival, strict=True):
            if answer.probe or self._steps_left % BROUGHT_STEPS == 0:
                self._brought.append((of, right[: len(answer.guess.token_ids)]))
        chosen = self._best(survival[places < lengths[:, None]], load, spent)
        owner = np.repeat(np.arange(len(answers)), lengths)
        numbers: list[int] = np.bincount(owner[chosen], minlength=len(answers)).tolist()
        self._verified = {}
        for answer, of, number in zip(answers, classes, numbers, strict=True):
            whole = number == len(answer.guess.token_ids)
            if not whole and self._shadow(answer, of):
                continue  # to be learned from later, as a whole
            if number:
                self._verified[answer.ask.request.id] = answer.ask.most if whole else number
        return numbers

    def learned(self, row: Row, nodes: Sequence[int]) -> None:
        """Of the guesses of ``row`` those were right that have ``nodes``."""
        if asked_for := self._verified.get(row.request.id):
            of = _Class(_kind(row.request), row.drafter, row.grade)
            self._see(of, len(row.drafts), nodes, asked_for)

    def ended(self, request: Request) -> None:
        """``request`` is over."""
        self._shadows.pop(request.id, None)

    def _best(self, survival: Floats, load: Load, spent: float) -> npt.NDArray[np.int64]:
        """Which of guesses that are right as often as ``survival`` says to verify. That never rises
        along a guess, and among equals the first ones are taken: so they are beginnings."""
        seconds = self.costs.with_guesses(load)[1:] + spent
        order = np.argsort(-survival, kind="stable")[: len(seconds)]
        if not len(order):
            return order
        goodput = (load.rows + np.cumsum(survival[order])) / seconds[: len(order)]
        best = int(np.argmax(goodput))
        plain = load.rows / (self.costs.without_guesses(load) + spent)
        return order[: best + 1 if goodput[best] > MARGIN * plain else 0]

    def _survival(self, classes: Sequence[_Class]) -> Floats:
        """How often each place of guesses of ``classes`` is right: [classes, LONGEST]."""
        if missing := [of for of in dict.fromkeys(classes) if of not in self._believed]:
            cells = [self._cells(of) for of in missing]
            means = self._right.means(cells)
            for mean, count in zip(means, self._right.counts(cells), strict=True):
                if known := int(np.argmin(count >= TRUST)):  # what is further may go on as it began
                    each = max(mean[known - 1] ** (1 / known), PRIOR[0])
                    mean[known:] = mean[known - 1] * each ** np.arange(1, LONGEST - known + 1)
            falling = np.minimum.accumulate(means, axis=1)
            self._believed.update(zip(missing, falling, strict=True))
        return np.stack([self._believed[of] for of in classes])

    def _cells(self, of: _Class) -> Cells:
        drafter = (of.drafter, of.kind.tree)
        return self._right.cells(of.kind, (drafter, of.grade), drafter)

    # -- learning --------------------------------------------------------------------------------

    def _shadow(self, answer: Answer, of: _Class) -> bool:
        """Remember a guess that was cut, unless another of its request is remembered."""
        request, guess = answer.ask.request, answer.guess
        if request.id in self._shadows:
            return False
        until = request.num_ids + max(depths(len(guess.token_ids), guess.parents))
        self._shadows[request.id] = _Shadow(request.num_ids, until, of, guess, answer.ask.most)
        return True

    def _compare(self, asks: Sequence[Ask]) -> None:
        """Learn from guesses that were cut and would have been verified by now."""
        for request in [ask.request for ask in asks] if self._shadows else ():
            shadow = self._shadows.get(request.id)
            if shadow is not None and request.num_ids >= shadow.until:
                del self._shadows[request.id]
                token_ids, parents, _ = shadow.guess
                came = [*request.ids[shadow.since : shadow.until].tolist(), None]
                drawn = [came[depth] for depth in depths(len(token_ids), parents)]
                nodes = verified(token_ids, drawn, (), parents)[1:]
                self._see(shadow.of, len(token_ids), nodes, shadow.asked_for)

    def _see(self, of: _Class, length: int, nodes: Sequence[int], asked_for: int) -> None:
        """Of a guess of ``length`` tokens those were right that have ``nodes``. A place that was
        asked for and not guessed was not right."""
        right = [node - 1 for node in nodes]
        self._seen.append(_Seen(of, length, right))
        if of.drafter in self._priced:
            self._seen.append(_Seen(of._replace(grade=None), asked_for, right))

    def _learn(self) -> None:
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
        if brought := self._brought:
            survival = np.zeros((len(brought), max(1, *(len(row) for _, row in brought))))
            for index, (_, row) in enumerate(brought):
                survival[index, : len(row)] = row
            self._asked.see(
                [self._asked.of(of.kind, of.drafter) for of, _ in brought], _brought(survival)
            )
            self._brought = []


def _group(ask: Ask) -> _Group:
    speculation = ask.request.speculation
    assert speculation is not None
    most = min(speculation.max_draft_tokens, LONGEST)
    return _Group(_kind(ask.request), ask.drafters, most)


def _left_out(ask: Ask, chain: Chain) -> list[str]:
    asked = [name for name, _ in chain]
    return [name for name in _group(ask).drafters if name not in asked]


def _kind(request: Request) -> _Kind:
    speculation = request.speculation
    text = (request.kv.model_id, request.adapters)
    return _Kind(text, speculation is not None and speculation.tree)


def _brought(survival: Floats) -> Floats:
    """At each of PRICES, the tokens of guesses [guesses, places] that are worth it and how many of
    them will be right, and whether there was a guess at all: [guesses, 2 * prices + 1]."""
    worth = survival[:, :, None] > PRICES
    right = (survival[:, :, None] * worth).sum(1)
    return np.concatenate([worth.sum(1), right, survival[:, :1] > 0], axis=1)
