"""What the planner itself takes, and when it plans, asks and rests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.speculation.simulated import (
    LONG,
    WARM,
    Scripted,
    Server,
    World,
    fixed,
    near,
    request,
    served,
    table,
)

from loramux.speculation import planner as planners
from loramux.speculation.costs import Costs, Load
from loramux.speculation.drafter import Ask
from loramux.speculation.planner import Planner


def test_who_comes_back_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts in turn, each for less time than there is between two plans."""
    lucky = {"easy": [0.95] * 8, "hard": [0.02] * 8}
    world = World(21)
    costs = Costs.alike(table(0.01, 0.001))
    drafter = Scripted(world, lambda r: lucky[r.adapters[0].digest])
    texts = {name: [request(name, adapter=name)] for name in lucky}
    server = Server(world, {"scripted": drafter}, costs, texts["easy"], Planner(costs))
    for name in (*lucky, *lucky):
        server.requests = texts[name]
        server.run(WARM)
    monkeypatch.setattr(server.drafting.planner, "_must_plan", lambda *_: False)
    for name in ("hard", "easy") * 2:
        server.requests = texts[name]
        server.run(20)
        assert (sum(server.verified[-12:]) > 12) is (name == "easy"), name


def test_steps_with_guesses_that_take_longer_than_the_table_says_are_noticed() -> None:
    """By the table guessing pays, 1.3 times; what a step takes beside its forward pass eats that
    up. It is noticed at one number of rows and not taken for true of another."""
    chance, promised = [0.6] * 4, table(0.01, 0.0018)
    told, real = Costs.alike(promised), Costs(promised, table(0.016, 0.0018))
    drafter = Scripted(World(16), lambda _: chance)
    server = served(drafter, real, 2, most=4)
    planner = server.drafting.planner
    assert planner is not None
    planner.costs = told
    server.run(WARM)
    assert max(fixed(told, 2, chance, lambda _: 0.0)) > 1.2 * 2 / promised.seconds[2]
    near(server.run(LONG), fixed(real, 2, chance, lambda _: 0.0))
    assert sum(server.verified[-LONG:]) < LONG / 4, "but for a try now and then"
    assert planner._reality.factor(2) > 1.1
    assert planner._reality.factor(16) == 1


def test_while_nobody_is_worth_asking_it_rests() -> None:
    """Steps without guesses shall cost what they cost without a planner."""
    costs = Costs.alike(table(0.01, 0.004))
    server = served(Scripted(World(17), lambda _: [0.02] * 8, each=1e-3), costs, 4)
    server.run(WARM)
    proposals: list[int] = []
    propose = server.drafting.propose
    server.drafting.propose = lambda asks, load: (  # type: ignore[method-assign]
        proposals.append(len(asks)) or propose(asks, load)
    )
    server.run(20 * planners.PROBE_STEPS)
    assert len(proposals) == 20


@pytest.mark.parametrize(("each", "plans"), [(1e-3, True), (1e-6, False)])
def test_asking_in_vain_brings_the_next_plan_forward(
    monkeypatch: pytest.MonkeyPatch, each: float, plans: bool
) -> None:
    """Where it takes time worth mentioning: who asks for next to nothing may wait for a guess."""
    costs = Costs.alike(table(0.01, 0.0003))
    drafter = Scripted(World(20), lambda _: [0.9] * 8, each=each)
    server = served(drafter, costs, 4)
    server.run(WARM)
    assert sum(server.verified[-20:]) > 0
    planner = server.drafting.planner
    assert planner is not None
    monkeypatch.setattr(planners, "PLAN_STEPS", 10**6)
    monkeypatch.setattr(planner, "_best", lambda *_: np.zeros(0, np.int64))
    made: list[Load] = []
    monkeypatch.setattr(
        planner, "_plan", lambda groups, load: made.append(load) or dict.fromkeys(groups, ())
    )
    server.run(20)
    assert bool(made) is plans


def test_planning_takes_its_share_of_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a plan takes beside a step, and however often the load changes."""
    costs = Costs.alike(table(0.01, 0.0003))
    server = served(Scripted(World(18), lambda _: [0.9] * 8), costs, 16)
    planner, crowd, plans = server.drafting.planner, server.requests, 0
    assert planner is not None
    plan = planner._plan

    def slow(*args: Any) -> Any:
        nonlocal plans
        plans += 1
        server.world.now += 0.02
        return plan(*args)

    monkeypatch.setattr(planner, "_plan", slow)
    for step in range(1000):
        server.requests = crowd[: 16 if step % 10 < 5 else 3]
        server.step()
    plain_s = 1000 * float(costs.plain.seconds[16])
    assert 3 <= plans and plans * 0.02 < 2 * planners.PLAN_SHARE * plain_s


def test_requests_that_come_and_go_do_not_make_it_plan_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their prompts and their new adapters: a plan takes longer than a small model's step."""
    world, costs = World(12), Costs.alike(table(0.01, 0.0003))
    drafter, planner = Scripted(world, lambda _: [0.9] * 8), Planner(costs)
    plans: list[Load] = []
    plan = planner._plan
    monkeypatch.setattr(
        planner, "_plan", lambda groups, load: plans.append(load) or plan(groups, load)
    )
    for step in range(planners.PLAN_STEPS):
        come = [request(f"{step}-{i}", adapter=f"a{step}") for i in range(8 + step % 8)]
        asks = [Ask(each, 8) for each in come]
        chains = planner.chains(asks, Load(len(come), 130 + step, 64), {"scripted": drafter})
        assert all(chain for chain in chains), "the new ones guess too"
    assert len(plans) == 1
    asks = [Ask(request("few", most=4), 8)] * 8
    planner.chains(asks, Load(8, 130, 64), {"scripted": drafter})
    assert len(plans) == 2, "what is unlike all that is known is planned"
    planner.chains(asks * 4, Load(32, 130, 64), {"scripted": drafter})
    assert len(plans) == 3, "and so is another load"


def test_some_steps_are_left_plain_to_compare_the_others_with() -> None:
    """Where it always pays to guess nobody would notice that plain steps became quicker."""
    costs = Costs.alike(table(0.01, 0.0))
    server = served(Scripted(World(22), lambda _: [0.9] * 8), costs, 2)
    server.run(WARM)
    server.run(4 * planners.PLAIN_STEPS)
    assert server.verified[-4 * planners.PLAIN_STEPS :].count(0) == 4
