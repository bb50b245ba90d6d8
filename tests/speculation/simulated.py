"""A server that computes nothing: steps cost what a table says, guesses are right as often as a
scenario says, and time is a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loramux.batch import Row
from loramux.request import AdapterRef, Adapters, Request, SamplingParams, Speculation
from loramux.sampling.verify import verified
from loramux.speculation.costs import Costs, CostTable, Load
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.drafting import Drafting
from loramux.speculation.planner import MARGIN, Planner

MOST_TOKENS = 256
Chance = Callable[[Request], Sequence[float]]
"""Of each place of a guess, that it is right when those before it are."""


def table(base: float, token: float, knee: int = 0) -> CostTable:
    """``base`` seconds, and ``token`` more for every token beyond ``knee``."""
    return CostTable(
        {rows: base + token * max(0, rows - knee) for rows in range(1, MOST_TOKENS + 1)},
        MOST_TOKENS,
    )


def token(request: Request, at: int) -> int:
    """What the target draws there."""
    return (at * 31 + len(request.id) * 7) % 1009


@dataclass
class World:
    """The clock, and chance."""

    seed: int = 0
    now: float = 0.0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)


@dataclass
class Scripted:
    """Right as ``chance`` says, which takes ``seconds`` a request; ``silent`` so often."""

    world: World
    chance: Chance
    each: float = 0.0
    silent: float = 0.0
    grades: bool = False
    rows_asked: int = 0

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        self.rows_asked += len(asks)
        self.world.now += self.each * len(asks)
        return [self._guess(ask) for ask in asks]

    def ended(self, request: Request) -> None: ...

    def _guess(self, ask: Ask) -> Guess:
        if self.world.rng.random() < self.silent:
            return Guess()
        request = ask.request
        grade = int(self.grades and self.world.rng.random() < 0.5)
        lucky = self.world.rng.random(ask.most) < self.chances(request, grade, ask.most)
        ids = [
            token(request, request.num_ids + place) + 2000 * (not right)
            for place, right in enumerate(lucky)
        ]
        return Guess(ids, grade=grade)

    def chances(self, request: Request, grade: int, most: int) -> npt.NDArray[np.float64]:
        """Half of all guesses of one that grades are hopeless, and say so."""
        hopeless = self.grades and grade == 0
        return np.resize([0.02] if hopeless else self.chance(request), most)


@dataclass
class Model(Scripted):
    """One that takes ``step`` seconds for each token ahead, for however many requests."""

    step: float = 0.0

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        self.world.now += self.seconds(len(asks), max(ask.most for ask in asks))
        return super().propose(asks)

    def seconds(self, rows: int, most: int) -> float:
        return self.step * most


class Server:
    """``requests`` that never end, step by step."""

    def __init__(
        self,
        world: World,
        drafters: dict[str, Scripted],
        costs: Costs,
        requests: Sequence[Request],
        planner: Planner | None = None,
    ) -> None:
        self.world, self.costs, self.requests = world, costs, list(requests)
        self.drafters = drafters
        self.drafting = Drafting(drafters, planner, clock=lambda: world.now)
        self.tokens = 0.0
        self.verified: list[int] = []

    def run(self, steps: int, prompt_tokens: int = 0) -> float:
        """Tokens a second: those expected of what is verified, so that luck does not matter."""
        began, before = self.world.now, self.tokens
        for _ in range(steps):
            self.step(prompt_tokens)
        return (self.tokens - before) / (self.world.now - began)

    def step(self, prompt_tokens: int = 0) -> None:
        rows = [Row(request, 1) for request in self.requests]
        asks = [Ask(r, r.speculation.max_draft_tokens) for r in self.requests if r.speculation]
        num_tokens = len(rows) + prompt_tokens
        load = Load(len(rows), num_tokens, MOST_TOKENS - num_tokens)
        rests = self.drafting.rests(load)
        drafts = iter([None] * len(asks) if rests else self.drafting.propose(asks, load))
        for row in rows:
            if row.request.speculation and (draft := next(drafts)) is not None:
                row.drafter = draft.drafter
                row.drafts, row.parents, row.grade = draft.guess
                row.num_tokens += len(row.drafts)
        total = sum(row.num_tokens for row in rows) + prompt_tokens
        assert total <= MOST_TOKENS
        recorded = total == len(rows)
        self.world.now += (self.costs.plain if recorded else self.costs.mixed).seconds[total]
        self.verified.append(total - num_tokens)
        for row in rows:
            self._commit(row)
        self.drafting.stepped()

    def _commit(self, row: Row) -> None:
        request = row.request
        came = [token(request, request.num_ids + ahead) for ahead in range(len(row.drafts) + 1)]
        request.expect()
        nodes = verified(row.drafts, came, (), row.parents)
        if row.drafts:
            self.drafting.learned(row, nodes[1:])
        request.receive([came[node] for node in nodes])
        self.tokens += 1
        if row.drafts:
            drafter = self.drafters[row.drafter]
            chances = drafter.chances(request, row.grade, len(row.drafts))
            self.tokens += float(np.cumprod(chances).sum())


def request(
    name: str,
    drafters: Sequence[str] = ("scripted",),
    most: int = 8,
    adapter: str = "",
    max_tokens: int = 60_000,
) -> Request:
    adapters: Adapters = (AdapterRef(adapter),) if adapter else ()
    return Request(
        name,
        prompt_ids=[1],
        sampling=SamplingParams(seed=0, max_tokens=max_tokens),
        adapters=adapters,
        speculation=Speculation(drafters=tuple(drafters), max_draft_tokens=most),
    )


def fixed(
    costs: Costs, rows: int, chance: Sequence[float], drafting_s: Callable[[int], float]
) -> npt.NDArray[np.float64]:
    """Tokens a second with 0, 1, ... guesses for each of ``rows``, all equally lucky."""
    survival = np.cumprod(chance)
    rates = [rows / costs.plain.seconds[rows]]
    for most in range(1, len(chance) + 1):
        tokens = rows * (1 + most)
        if tokens <= MOST_TOKENS:
            seconds = costs.mixed.seconds[tokens] + drafting_s(most)
            rates.append(rows * (1 + survival[:most].sum()) / seconds)
    return np.array(rates)


WARM, LONG = 300, 60
"""Steps until something is known, and steps that count."""


def served(
    drafter: Scripted,
    costs: Costs,
    rows: int,
    planned: bool = True,
    adapter: str = "",
    most: int = 8,
) -> Server:
    requests = [request(f"r{index}", adapter=adapter, most=most) for index in range(rows)]
    planner = Planner(costs) if planned else None
    return Server(drafter.world, {"scripted": drafter}, costs, requests, planner)


def near(got: float, rates: npt.NDArray[np.float64]) -> None:
    """Not slower than nothing, and no further from the best fixed length than the planner's own
    margin: it is not told what is best and goes on trying. Where that is hardly better than nothing
    it may well stay with nothing."""
    assert got >= 0.98 * rates[0]
    assert got >= rates.max() / MARGIN * (1 if rates.max() > 1.1 * rates[0] else 0.97)


def usual(rate: Callable[[int], float], seed: int) -> float:
    """The middle one of three by luck: who was unlucky at first may stay with less for long."""
    return sorted(rate(3 * seed + run) for run in range(3))[1]
