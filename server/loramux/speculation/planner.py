"""How far to guess: as far as tokens come faster by it.

What counts is goodput, the expected tokens of a step over its seconds (SmartSpec, arXiv
2406.14066), never the share of guesses that are right: that is the same for one request, where a
guess is free, and for forty, where each takes the place of a token. Every step

1. decides who is asked, and for how much (``chains``): a drafter's time may be worth more than its
   guesses, or those of the next one;
2. has the guesses, and cuts them (``choose``): the likeliest of all rows, as many as pay.

A guess is likely when guesses like it were right (``Record``): for these adapters, by this
drafter, of this grade, at this place. Whoever is not asked is probed now and then; while nobody is,
the planner rests between the probes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loramux.batch import Row
from loramux.request import Request
from loramux.speculation.beliefs import MOST_OWNERS, Floats
from loramux.speculation.costs import Costs, Load, Reality
from loramux.speculation.drafter import Ask, Drafter, Guess
from loramux.speculation.promises import Promises
from loramux.speculation.prospects import PRICES, Duration, Group, Prospects, Table
from loramux.speculation.record import LONGEST, Class, Record, kind_of

PASSES = 3
"""What time is worth depends on what is done with it: so often that is gone through."""
MARGIN = 1.05
"""How much faster than without guesses a step must promise to be."""
PLAN_STEPS = 32
"""So long who is asked stays decided while the load is about the same."""
PLAN_SHARE, IDLE_SHARE = 0.02, 0.005
"""Of the time of plain steps, for planning, and while nobody is worth asking: with a small model a
plan takes as long as a step, and what was decided holds for longer, also under another load."""
LOST_STEPS = 2.0
"""When so many plain steps' time, and at least that of a plan, was lost by asking, it is time for
the next plan."""
BROUGHT_STEPS = 2
"""What an ask brings is counted so often: that takes time too."""
PLAIN_STEPS = 64
"""Of so many steps in which somebody would be asked one is left as it is, to compare them with."""
PROBE_SHARE = 0.005
"""Of the time of plain steps, for asking those who are not worth it, in case they are by now."""
PROBE_MOST = 2
"""Tokens that those are asked for who take longer for more."""
PROBE_STEPS = 8
"""So often at most: planning a probe takes time too."""
WAKE_SHARE, LONGEST_REST = 0.01, 32
"""Of the time of plain steps, for looking whether somebody is worth asking again; but the text of a
request may begin to repeat itself at any time, so that many steps at most without."""
SAVED_STEPS = 2.0
"""Steps' worth of unused time for probes that is kept."""


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


class Planner:
    """Chooses what to guess in steps that cost what ``costs`` says."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._record = Record()
        self._prospects = Prospects(self._record)
        self._verified: dict[str, int] = {}
        self._planned: dict[Group, Chain] = {}
        self._planned_for: tuple[int, int, int] | None = None
        self._steps_since = 0
        self._plan_s, self._wake_s = Duration(), Duration()
        self._reality = Reality()
        self._promises = Promises()
        self._load = Load(0, 0, 0)
        self._guesses, self._right = 0, 0.0
        self._asked: bool | None = None
        self._rest = self._awake = 0
        self._credit_s = 0.0
        self._turn = 0

    # -- before drafting -------------------------------------------------------------------------

    def rests(self, load: Load) -> bool:
        """Nobody is worth asking in a step of ``load``, and it is not yet time to see whether that
        has changed; or it is time to see what such a step takes. To be called once a batch."""
        self._load, self._guesses, self._right, self._asked = load, 0, 0.0, False
        if self._rest > 1:
            self._rest -= 1
            if self._rest > 1:
                self._asked = None  # of a rest one step is looked at
            return True
        self._awake += 1
        unknown = load.tokens == load.rows and not self._reality.plain(load.rows)
        return unknown or self._awake % PLAIN_STEPS == 0

    @property
    def wakes(self) -> bool:
        """The next step is one to ask in."""
        return self._rest <= 1

    def chains(
        self, asks: Sequence[Ask], load: Load, drafters: Mapping[str, Drafter]
    ) -> list[Chain]:
        """For each of ``asks``: which of its request's ``drafters`` to ask."""
        self._record.compare([ask.request for ask in asks])
        groups = [Group.of(ask) for ask in asks]
        must_plan = self._must_plan(groups, load)
        if must_plan:
            self._record.learn()
            self._prospects.learn()
            self._prospects.offered(drafters)
            if len(self._planned) > MOST_OWNERS:
                self._planned.clear()
            self._planned |= self._plan(Counter(groups), load)
            self._steps_since = 0
        chains = [self._planned.get(group, ()) for group in groups]
        self._rest = 0 if any(chains) else self._rest_for(self.costs.without_guesses(load))
        self._asked = None if must_plan or self._rest else True
        self._steps_since += max(1, self._rest)
        return [
            [(name, min(most, ask.most)) for name, most in chain]
            for chain, ask in zip(chains, asks, strict=True)
        ]

    def proposed(self, seconds: float, asked_s: float) -> None:
        """A step's proposals took ``seconds``, and the drafters beside that ``asked_s``."""
        if self._steps_since <= max(1, self._rest):
            self._plan_s.took(seconds)
        elif self._rest:
            self._wake_s.took(seconds + asked_s)

    def _rest_for(self, plain_s: float) -> int:
        """Steps until the next look: with a small model that takes a part of a step."""
        return max(PROBE_STEPS, min(LONGEST_REST, int(self._wake_s.mean / (WAKE_SHARE * plain_s))))

    def stepped(self, seconds: float, asked_s: float) -> None:
        """The step took ``seconds``, and the drafters beside that ``asked_s``."""
        load, asked = self._load, self._asked
        if asked is None or load.tokens != load.rows:  # prompts' contexts differ
            return
        plain_s = self._reality.plain(load.rows) * self.costs.without_guesses(load)
        if asked and plain_s:
            self._promises.took(load.rows + self._right, seconds + asked_s, load.rows, plain_s)
        if self._guesses or not asked:
            table = self.costs.mixed if self._guesses else self.costs.plain
            ratio = seconds / float(table.seconds[load.rows + self._guesses])
            self._reality.took(load.rows, asked=asked, ratio=ratio)

    def _must_plan(self, groups: Sequence[Group], load: Load) -> bool:
        """Much has changed, or was seen, and there is time for it again."""
        now = (len(groups).bit_length(), load.rows.bit_length(), load.tokens.bit_length())
        plain_s, plan_s = self.costs.without_guesses(load), self._plan_s.mean
        share = IDLE_SHARE if self._rest else PLAN_SHARE
        due = share * self._steps_since * plain_s >= plan_s
        known = self._knows(groups)
        changed = now != self._planned_for or not known or self._steps_since >= PLAN_STEPS
        if (due and changed) or self._promises.lost_s > max(LOST_STEPS * plain_s, plan_s):
            self._planned_for = now
            return True
        return False

    def _knows(self, groups: Sequence[Group]) -> bool:
        """There is a plan for each of ``groups``: its own, or until the next time that of another
        with the same drafters, since requests of new adapters come at any step."""
        for group in groups:
            if group not in self._planned:
                other = next(
                    (each for each in reversed(self._planned) if each.is_like(group)), None
                )
                if other is None:
                    return False
                self._planned[group] = self._planned[other]
        return True

    def took(self, drafter: str, rows: int, seconds: float) -> None:
        """``drafter`` was asked about ``rows`` requests, which took ``seconds``."""
        self._prospects.took(drafter, rows, seconds)

    def _plan(self, groups: Counter[Group], load: Load) -> dict[Group, Chain]:
        """Whom to ask at the price that promises the most. Where a drafter has no answer the next
        is asked, so of a chain those are kept that bring more than what comes after them would."""
        table = self._prospects.table(groups)
        times = np.array(list(groups.values()))
        plain = load.rows / self.costs.without_guesses(load)
        costs = self._with_guesses(load)
        rate, price, each_s = plain, 0, np.zeros(len(PRICES))
        places = np.arange(len(PRICES))
        for _ in range(PASSES):
            worth, kept = _worth(table, rate, each_s)
            tokens, right, seconds = np.tensordot(times, worth, (0, 1))
            upto = np.arange(min(len(costs), int(tokens.max(initial=0)) + 2))[:, None]
            verified = np.minimum(upto, tokens)  # the likeliest of them, so at least so many right
            taken = np.interp(verified, np.arange(len(costs)), costs)
            rights = right * verified / np.maximum(tokens, 1e-9)
            goodputs = np.where(tokens > 0, load.rows + rights, 0) / (taken + seconds)
            goodput, cut = goodputs.max(0), goodputs.argmax(0)
            each_s = (taken - costs[0])[cut, places] / np.maximum(verified[cut, places], 1)
            price = int(np.argmax(goodput))
            rate = max(plain, float(goodput[price]))
        pays = rate * self._promises.kept(load.rows) > MARGIN * plain
        self._promises.made(load.rows, rate / plain if pays else None)
        if not pays:
            return dict.fromkeys(groups, ())
        return {
            group: [
                (name, int(table.depth[place, index, price]))
                for place, name in enumerate(group.drafters)
                if kept[place, index, price]
            ]
            for index, group in enumerate(groups)
        }

    def probes(self, asks: Sequence[Ask], chains: Sequence[Chain], load: Load) -> list[Question]:
        """Which of those that ``chains`` leave out to ask about ``asks`` nevertheless, if there is
        time for one: about as many requests as there is time for."""
        plain_s, steps = self.costs.without_guesses(load), max(1, self._rest)
        self._credit_s = min(self._credit_s, SAVED_STEPS * plain_s) + PROBE_SHARE * steps * plain_s
        self._turn += steps
        if self._turn % PROBE_STEPS >= steps:
            return []
        left_out = [
            [name for name in ask.drafters if name not in dict(chain)]
            for ask, chain in zip(asks, chains, strict=True)
        ]
        names = Counter(name for each in left_out for name in each)
        if not names:
            return []
        name = sorted(names)[self._turn // PROBE_STEPS % len(names)]
        priced = name in self._prospects.priced
        most, rows = PROBE_MOST if priced else LONGEST, names[name]
        if not priced and (each_s := self._prospects.seconds(name, 1, most)):
            rows = min(rows, max(1, int(self._credit_s / each_s)))
        if (seconds := self._prospects.seconds(name, rows, most)) > self._credit_s:
            return []
        self._credit_s -= seconds
        order = [(self._turn + i) % len(asks) for i in range(len(asks))]
        those = [i for i in order if name in left_out[i]][:rows]
        return [Question(i, name, min(most, asks[i].most)) for i in those]

    # -- after drafting --------------------------------------------------------------------------

    def choose(self, answers: Sequence[Answer], load: Load, spent: float) -> list[int]:
        """How many tokens of each guess to verify. ``spent`` is the time that they took."""
        classes = [Class(kind_of(a.ask.request), a.drafter, a.guess.grade) for a in answers]
        survival = self._record.survival(classes)
        lengths = np.array([0 if a.probe else len(a.guess.token_ids) for a in answers])
        places = np.arange(LONGEST)
        for answer, of, right in zip(answers, classes, survival, strict=True):
            if answer.probe or self._steps_since % BROUGHT_STEPS == 0:
                self._prospects.see(of, right[: len(answer.guess.token_ids)])
        offered = survival[places < lengths[:, None]]
        chosen = self._best(offered, load, spent)
        self._guesses, self._right = len(chosen), float(offered[chosen].sum())
        owner = np.repeat(np.arange(len(answers)), lengths)
        numbers: list[int] = np.bincount(owner[chosen], minlength=len(answers)).tolist()
        self._verified = {}
        for answer, of, number in zip(answers, classes, numbers, strict=True):
            request, most = answer.ask.request, answer.ask.most
            whole = number == len(answer.guess.token_ids)
            if not whole and self._record.remember(
                request, of, answer.guess, self._asked_for(of.drafter, most)
            ):
                continue  # to be learned from later, as a whole
            if number:
                self._verified[request.id] = most if whole else number
        return numbers

    def learned(self, row: Row, nodes: Sequence[int]) -> None:
        """Of the guesses of ``row`` those were right that have ``nodes``."""
        if most := self._verified.get(row.request.id):
            of = Class(kind_of(row.request), row.drafter, row.grade)
            self._record.see(of, len(row.drafts), nodes, self._asked_for(of.drafter, most))

    def ended(self, request: Request) -> None:
        """``request`` is over."""
        self._record.forget(request)

    def _with_guesses(self, load: Load) -> Floats:
        return self.costs.with_guesses(load) * self._reality.factor(load.rows)

    def _asked_for(self, drafter: str, most: int) -> int | None:
        return most if drafter in self._prospects.priced else None

    def _best(self, survival: Floats, load: Load, spent: float) -> npt.NDArray[np.int64]:
        """Which of guesses that are right as often as ``survival`` says to verify. That never rises
        along a guess, and among equals the first ones are taken: so they are beginnings."""
        seconds = self._with_guesses(load)[1:] + spent
        order = np.argsort(-survival, kind="stable")[: len(seconds)]
        if not len(order):
            return order
        goodput = (load.rows + np.cumsum(survival[order])) / seconds[: len(order)]
        best = int(np.argmax(goodput))
        plain = load.rows / (self.costs.without_guesses(load) + spent)
        return order[: best + 1 if goodput[best] > MARGIN * plain else 0]


def _worth(table: Table, rate: float, each_s: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """At each of PRICES, while a second is worth ``rate`` tokens and verifying one takes ``each_s``
    [prices]: [tokens, right ones, seconds] of each group's ask [3, groups, prices], and who is kept
    of its chain [places, groups, prices]."""
    own = table.right - rate * (table.seconds + each_s * table.tokens)
    kept = own > 0
    worth = np.zeros((3, *own.shape[1:]))
    surplus = np.zeros(own.shape[1:])
    for place in reversed(range(len(own))):
        answers = table.answers[place]
        keep = kept[place] = kept[place] & (MARGIN * own[place] >= answers * surplus)
        brings = np.stack([table.tokens[place], table.right[place], table.seconds[place]])
        surplus = np.where(keep, own[place] + (1 - answers) * surplus, surplus)
        worth = np.where(keep, brings + (1 - answers) * worth, worth)
    return worth, kept
