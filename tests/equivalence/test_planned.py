"""Drafted = plain with the planner at work, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.equivalence.drafted import MOST, SAMPLINGS, served, told, truth
from tests.equivalence.test_drafted import Scripted, ScriptedTrees
from tests.harness import Harness
from tests.trees import random_parents

from loramux.request import Speculation
from loramux.speculation.costs import Costs, CostTable
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.planner import Planner


def planned(harness: Harness, token_s: float) -> Planner:
    """Give the engine a planner whose steps cost 10 ms, and ``token_s`` a token."""
    table = CostTable({1: 0.01, 512: 0.01 + 511 * token_s}, 512)
    harness.engine.drafting.planner = planner = Planner(Costs.alike(table))
    return planner


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("token_s", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("sampling", ["greedy", "processed"])
def test_tokens_do_not_depend_on_the_planner(
    llama: Path, adapters: dict[str, Path], sampling: str, token_s: float, trees: bool
) -> None:
    knobs = SAMPLINGS[sampling]
    harness = served(llama, adapters, knobs)
    harness.run()
    plain = told(harness)
    harness.close()
    rng = np.random.default_rng(1)
    drafter: Any = Scripted(
        truth(plain), lambda: int(rng.integers(0, MOST + 2)), lambda: int(rng.integers(0, 9))
    )
    if trees:
        drafter = ScriptedTrees(
            truth(plain), lambda most: random_parents(rng, most), lambda node: rng.random() < 0.7
        )
    harness = served(llama, adapters, knobs, drafter, max_batch_tokens=24)
    planned(harness, token_s)
    harness.run_preempting(rng, 0.1)
    assert told(harness) == plain
    verified = sum(sum(step.stats.get("drafted", {}).values()) for step in harness.steps)
    assert (verified > 0) is (token_s < 1.0)
    harness.close()


class Hopeless:
    """Looks at what was computed, and guesses what never comes."""

    def __init__(self) -> None:
        self.rows = self.looks = 0

    def propose(self, asks: list[Ask]) -> list[Guess]:
        self.rows += len(asks)
        return [Guess([1] * ask.most) for ask in asks]

    def saw(self, requests: Any, hidden: Any) -> None:
        self.looks += 1

    def ended(self, request: Any) -> None: ...


def test_who_is_never_right_is_hardly_asked_and_not_verified(llama: Path) -> None:
    harness = Harness(llama, page_tokens=16)
    planner = planned(harness, 5e-3)
    harness.engine.drafting.drafters["hopeless"] = hopeless = Hopeless()
    speculation = Speculation(drafters=("hopeless",), max_draft_tokens=4)

    def serve() -> tuple[int, int, int, int]:
        first, asked, looks = len(harness.steps), hopeless.rows, hopeless.looks
        for index in range(4):
            harness.submit([60 + index] * 3, speculation=speculation, max_tokens=200)
        harness.run()
        steps = harness.steps[first:]
        verified = sum(sum(step.stats.get("drafted", {}).values()) for step in steps)
        return len(steps), verified, hopeless.rows - asked, hopeless.looks - looks

    serve()
    num_steps, verified, asked, looks = serve()
    assert verified == 0
    assert looks <= num_steps / 8 + 1, "states are copied only for steps in which somebody asks"
    assert asked <= 4 * (num_steps / 8 + 1), "probed more often than every eighth step"
    assert not planner._record._shadows, "of requests that ended"
    harness.close()


def test_costs_are_measured_unless_nobody_guesses(llama: Path) -> None:
    harness = Harness(llama, speculation="auto", max_batch_tokens=200)
    planner = harness.engine.drafting.planner
    assert planner is not None
    for table in planner.costs:
        assert len(table.seconds) == 201
        assert table.seconds[1] > 0 and (np.diff(table.seconds) >= 0).all()
    assert harness.generate(range(60, 70), speculation=Speculation(drafters=("lookup",)))
    harness.close()
    harness = Harness(llama)
    assert harness.engine.drafting.planner is None
    harness.close()
