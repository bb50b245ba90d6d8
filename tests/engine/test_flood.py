"""One asks for twenty times its share, nineteen for theirs: how long those wait, in steps.

The clock is the step and arrivals are drawn from a seed, so every run is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.engine.fakes import Bench

from loramux.request import Request, Status

KEYS, SEATS, OUTPUT = 20, 16, 16
STEPS, WARM_UP = 600, 120
ROOM = 120
"""What admission lets one flood have waiting (front/admission)."""
DEBT = 256
"""As the default is to requests of some hundred tokens, about five requests."""


class Arrivals:
    """Poisson arrivals of twenty keys, whose shares together are ``load`` of what the seats can
    serve; with ``flood`` the first asks for twenty times its own."""

    def __init__(self, by: str, load: float, seed: int, *, flood: bool, **limits: Any) -> None:
        self.bench = Bench(
            300,
            {f"a{key}": 1 for key in range(KEYS)},
            max_num_seqs=SEATS,
            fairness_debt_tokens=limits.pop("debt", DEBT),
        )
        self.by = by
        self.rng = np.random.default_rng(seed)
        self.rates = np.full(KEYS, load * SEATS / OUTPUT / KEYS)
        if flood:
            self.rates[0] *= KEYS
        self.flooding: list[Request] = []
        self.waiting: list[tuple[Request, int, int]] = []
        self.serial = 0

    def run(self) -> list[int]:
        """Steps until the first token of each request of the nineteen, the last step included."""
        waited = []
        for step in range(STEPS):
            for key, num in enumerate(self.rng.poisson(self.rates)):
                for _ in range(num):
                    self.arrive(key, step)
            self.bench.step()
            for request, key, came in [w for w in self.waiting if w[0].num_outputs]:
                self.waiting.remove((request, key, came))
                if key and came >= WARM_UP:
                    waited.append(step - came + 1)
            self.flooding = [r for r in self.flooding if r.status is not Status.DONE]
        unserved = [STEPS - came for _, key, came in self.waiting if key and came >= WARM_UP]
        return waited + unserved

    def arrive(self, key: int, step: int) -> None:
        if key == 0 and len(self.flooding) >= ROOM:
            return
        self.serial += 1
        whose = {"adapter": f"a{key}"} if self.by == "adapter" else {"tenant": f"t{key}"}
        if key == 0 and self.by == "tenant with many adapters":
            whose["adapter"] = f"a{self.serial % KEYS}"
        request = self.bench.add(
            f"r{self.serial}",
            ids=[self.serial, *range(int(self.rng.integers(3, 11)))],
            max_tokens=int(self.rng.integers(OUTPUT // 2, 3 * OUTPUT // 2)),
            **whose,
        )
        self.waiting.append((request, key, step))
        if key == 0:
            self.flooding.append(request)


def p95(by: str, load: float, *, flood: bool, **limits: Any) -> float:
    waited: list[int] = []
    for seed in range(2):
        waited += Arrivals(by, load, seed, flood=flood, **limits).run()
    assert len(waited) > 200
    return float(np.percentile(waited, 95))


@pytest.mark.parametrize("by", ["adapter", "tenant", "tenant with many adapters"])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_flood_at_most_doubles_what_the_others_wait(by: str, load: float) -> None:
    assert p95(by, load, flood=True) <= 2 * p95(by, load, flood=False)


def test_without_fair_turns_it_would_not() -> None:
    """That the test can fail: nobody is ever asked to give a seat back."""
    calm = p95("adapter", 0.8, flood=False, debt=10**9)
    assert p95("adapter", 0.8, flood=True, debt=10**9) > 2 * calm
