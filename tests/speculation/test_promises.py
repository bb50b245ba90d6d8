"""Plans are held to what they promised."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from tests.speculation.simulated import LONG, WARM, Scripted, World, served, table

from loramux.speculation import promises
from loramux.speculation.costs import Costs
from loramux.speculation.planner import LONGEST_REST, PROBE_STEPS, Planner
from loramux.speculation.promises import Promises
from loramux.speculation.prospects import Group, Table

PLAIN_S = 0.01


def disappointed(gain: float, tokens: float, steps: int = 1000) -> Promises:
    """A plan for two rows promised ``gain``; every step brings ``tokens`` in a plain one's time."""
    found = Promises()
    found.made(2, gain)
    for _ in range(steps):
        found.took(tokens, PLAIN_S, 2, PLAIN_S)
    return found


def test_what_became_of_a_promise_is_expected_of_the_next() -> None:
    found = disappointed(gain=2.0, tokens=1.5)
    assert found.kept(2) == 1, "it is judged when it is over"
    found.made(2, 2.0)
    assert found.kept(2) == pytest.approx(0.375, abs=0.01)
    assert found.kept(3) == found.kept(2), "loads of about as many"
    assert found.kept(16) == 1


@pytest.mark.parametrize(("gain", "tokens"), [(1.2, 4.0), (2.0, 2.0)])
def test_whoever_is_not_slower_than_plain_steps_is_let_go_on(gain: float, tokens: float) -> None:
    found = disappointed(gain, tokens)
    found.made(2, gain)
    assert found.kept(2) == 1


def test_a_few_steps_say_nothing() -> None:
    found = disappointed(2.0, 1.0, promises.FEW - 1)
    found.made(2, 2.0)
    assert found.kept(2) == 1


def test_a_disappointment_is_forgotten_while_nobody_is_asked() -> None:
    found = disappointed(2.0, 1.0)
    kept = []
    for _ in range(5 * promises.RETURN):
        found.made(2, None)
        kept.append(found.kept(2))
    assert kept[0] < 0.6 and kept == sorted(kept) and kept[-1] > 0.98


def test_what_is_lost_is_told_until_the_next_plan() -> None:
    """A step that brings two rows' tokens in twice a plain step's time loses a step's; one that
    brings twice the tokens wins it back, and nothing is saved up."""
    found = Promises()
    found.made(2, 1.5)
    found.took(4, PLAIN_S, 2, PLAIN_S)
    assert found.lost_s == 0
    found.took(2, 2 * PLAIN_S, 2, PLAIN_S)
    assert found.lost_s == pytest.approx(PLAIN_S)
    found.took(4, PLAIN_S, 2, PLAIN_S)
    assert found.lost_s == pytest.approx(0)
    found.took(2, 1000 * PLAIN_S, 2, PLAIN_S)
    assert found.lost_s == pytest.approx((promises.MOST_PLAIN - 1) * PLAIN_S), "held up, not asked"
    found.took(2, 2 * PLAIN_S, 16, PLAIN_S)
    assert found.lost_s == pytest.approx((promises.MOST_PLAIN - 1) * PLAIN_S), "another load"
    found.made(2, 1.5)
    assert found.lost_s == 0


def test_plans_that_expect_too_much_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess is rarer than is thought, and looking for one in every step takes more than it
    brings."""
    costs = Costs.alike(table(0.01, 0.0))
    drafter = Scripted(World(31), lambda _: [0.95] * 2, silent=0.95, each=0.003)
    server = served(drafter, costs, 1, most=2)
    planner = server.drafting.planner
    assert planner is not None
    honest = planner._prospects.table

    def hopeful(groups: Mapping[Group, int]) -> Table:
        found = honest(groups)
        return found._replace(tokens=9 * found.tokens, right=9 * found.right)

    monkeypatch.setattr(planner._prospects, "table", hopeful)
    server.run(10 * WARM)
    assert server.run(10 * LONG) >= 0.97 / 0.01


def test_rests_are_longer_the_more_a_look_takes() -> None:
    costs = Costs.alike(table(0.01, 0.004))
    lengths = {}
    for look_s in (0.0, 0.0015, 0.1):
        planner = Planner(costs)
        for _ in range(50):
            planner._rest = 1
            planner._steps_since = 9
            planner.proposed(look_s, 0.0)
        lengths[look_s] = planner._rest_for(0.01)
    assert lengths == {0.0: PROBE_STEPS, 0.0015: 15, 0.1: LONGEST_REST}
