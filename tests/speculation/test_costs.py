"""What steps cost, by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from loramux.speculation.costs import (
    FORGOTTEN,
    POINTS,
    REPEATS,
    Costs,
    CostTable,
    Load,
    Reality,
    measure,
)


@dataclass
class Machine:
    """``cost(rows)`` seconds a step, and ``extra`` for the runs of that number."""

    cost: Callable[[int], float]
    extra: dict[int, float] = field(default_factory=dict)
    now: float = 5.0
    runs: list[int] = field(default_factory=list)

    def run(self, rows: int) -> None:
        self.now += self.cost(rows) + self.extra.get(len(self.runs), 0.0)
        self.runs.append(rows)

    def clock(self) -> float:
        return self.now


def test_all_points_are_measured_where_there_is_time() -> None:
    machine = Machine(lambda rows: 1e-4 * (10 + rows))
    table = measure(machine.run, 300, machine.clock)
    assert sorted(set(machine.runs)) == sorted(POINTS)
    assert len(machine.runs) == REPEATS * len(POINTS)
    assert table.seconds[1:] == pytest.approx(1e-4 * (10 + np.arange(1, 301)))
    assert len(table.seconds) == 301


def test_the_best_of_a_few_counts() -> None:
    """Something else ran meanwhile: during one run of each point, and during all of one's."""
    slow = {REPEATS * i + i % REPEATS: 0.01 for i in range(len(POINTS))}
    all_of_eight = {REPEATS * POINTS.index(8) + i: 0.03 for i in range(REPEATS)}
    machine = Machine(lambda rows: 1e-4 * (10 + rows), slow | all_of_eight)
    table = measure(machine.run, 256, machine.clock)
    assert table.seconds[[1, 4, 16, 256]] == pytest.approx([11e-4, 14e-4, 26e-4, 266e-4])
    assert table.seconds[8] == pytest.approx(table.seconds[12]), "less than a larger step"
    assert (np.diff(table.seconds) >= 0).all()


def test_a_large_model_is_measured_where_it_matters_most() -> None:
    machine = Machine(lambda rows: 0.02 + 0.002 * rows)
    table = measure(machine.run, 512, machine.clock)
    assert machine.now - 5.0 < 1.1
    assert {1, 16, 4, 8} <= set(machine.runs) and 256 not in machine.runs
    assert table.seconds[1:] == pytest.approx(0.02 + 0.002 * np.arange(1, 513))
    huge = Machine(lambda rows: 1.0 + 0.01 * rows)
    measure(huge.run, 512, huge.clock)
    assert set(huge.runs) == {1, 16}


def test_no_step_is_larger_than_may_be() -> None:
    machine = Machine(lambda rows: 0.001)
    measure(machine.run, 20, machine.clock)
    assert max(machine.runs) == 16
    machine = Machine(lambda rows: 0.001)
    assert len(measure(machine.run, 512, machine.clock, largest=64).seconds) == 513
    assert max(machine.runs) == 64


def test_between_points_and_beyond() -> None:
    table = CostTable({1: 1.0, 3: 2.0, 4: 2.0}, 10)
    assert table.seconds[[1, 2, 3, 4]].tolist() == [1.0, 1.5, 2.0, 2.0]
    slope = (2.0 - 1.0) / (4 - 1)  # flat at the end, but not for ever
    assert table.seconds[10] == pytest.approx(2.0 + 6 * slope)
    assert CostTable({1: 1.0, 3: 2.0, 4: 4.0}, 10).seconds[10] == pytest.approx(4.0 + 6 * 2)
    assert CostTable({1: 1.0}, 1).seconds[1] == 1.0


def test_a_load_without_prompts() -> None:
    costs = Costs(CostTable({1: 1.0, 9: 1.0}, 9), CostTable({1: 2.0, 9: 10.0}, 9))
    assert costs.without_guesses(Load(3, 3, 6)) == 1.0
    assert costs.with_guesses(Load(3, 3, 2)).tolist() == [4.0, 5.0, 6.0]
    assert costs.with_guesses(Load(3, 3, 6))[-1] == 10.0


def test_a_load_with_prompts_costs_what_guesses_add() -> None:
    costs = Costs(CostTable({1: 1.0, 9: 1.0}, 9), CostTable({1: 2.0, 9: 10.0}, 9))
    assert costs.without_guesses(Load(2, 5, 4)) == 3.0, "no replay beside a prompt"
    assert costs.with_guesses(Load(2, 5, 2)).tolist() == [3.0, 4.0, 5.0]


def test_what_was_disturbed_once_is_forgotten() -> None:
    """While nobody is asked, nothing is seen of steps with guesses."""
    reality = Reality()
    reality.took(2, asked=False, ratio=1.0)
    reality.took(2, asked=True, ratio=3.0)
    assert reality.factor(2) == 3
    factors = []
    for _ in range(4 * FORGOTTEN):
        reality.took(2, asked=False, ratio=1.0)
        factors.append(reality.factor(2))
    assert factors == sorted(factors, reverse=True)
    assert factors[0] > 2.9 and factors[-1] < 1.1
