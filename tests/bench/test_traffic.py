"""The traffic generator: the moments of its distributions, and the same plan from the same seed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from loramux.bench import traffic
from loramux.bench.traffic import Arrival, Traffic, draw

MANY = Traffic(rate=100.0, duration_s=200.0)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_cv_asked_for(cv: float) -> None:
    at = np.array([0.0, *(arrival.at_s for arrival in draw(replace(MANY, cv=cv)))])
    gaps = np.diff(at)
    assert len(gaps) == 20_000 and (gaps >= 0).all()
    # Standard errors: of the mean cv / sqrt(n), of the cv a few times that for heavy tails.
    assert gaps.mean() * 100 == pytest.approx(1, abs=5 * cv / 141)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    third = np.mean(((gaps - gaps.mean()) / gaps.std()) ** 3)
    assert third == pytest.approx(2 * cv, rel=0.35), "a Gamma's skewness"


@pytest.mark.parametrize(("alpha", "n"), [(1.0, 10), (0.1, 1000), (0.8, 7), (3.0, 5)])
def test_adapters_get_the_shares_the_docstring_says(alpha: float, n: int) -> None:
    named = [arrival.adapter for arrival in draw(replace(MANY, alpha=alpha, adapters=n))]
    shares = np.bincount(named, minlength=n) / len(named)
    edges = (np.arange(n + 1) / n) ** alpha
    assert len(shares) == n
    assert np.abs(shares - np.diff(edges)).max() < 5 * 0.5 / 141
    if alpha == 0.1:
        assert shares[0] == pytest.approx(0.5, abs=0.02)


def test_lengths_are_uniform_without_the_upper_end() -> None:
    plan = draw(replace(MANY, prompt=(8, 12), output=(3, 5)))
    for lengths, expected in (
        ([a.prompt_tokens for a in plan], {8, 9, 10, 11}),
        ([a.output_tokens for a in plan], {3, 4}),
    ):
        values, counts = np.unique(lengths, return_counts=True)
        assert set(values.tolist()) == expected
        assert np.abs(counts / len(plan) - 1 / len(expected)).max() < 0.02


def test_ranks_come_in_turn_and_tenants_evenly() -> None:
    plan = draw(replace(MANY, ranks=(8, 16, 32, 64), tenants=4, adapters=10))
    assert all(arrival.rank == (8, 16, 32, 64)[arrival.adapter % 4] for arrival in plan)
    shares = np.bincount([arrival.tenant for arrival in plan]) / len(plan)
    assert len(shares) == 4 and np.abs(shares - 0.25).max() < 0.02


def test_a_cold_adapter_is_named_once_and_never_one_of_the_others() -> None:
    plan = draw(replace(MANY, adapters=50, cold_share=0.2))
    cold = [arrival.adapter for arrival in plan if arrival.cold]
    assert cold == list(range(50, 50 + len(cold)))
    assert len(cold) / len(plan) == pytest.approx(0.2, abs=0.02)
    assert all(arrival.adapter < 50 for arrival in plan if not arrival.cold)
    assert traffic.num_adapters(replace(MANY, adapters=50), plan) == 50 + len(cold)


def test_without_adapters_the_base_is_named() -> None:
    assert {(a.adapter, a.rank) for a in draw(replace(MANY, adapters=0))} == {(-1, 0)}


def test_a_seed_gives_one_plan_and_others_give_others() -> None:
    few = replace(MANY, duration_s=1.0)
    assert draw(few) == draw(few) != draw(replace(few, seed=43))


def test_the_number_of_adapters_moves_neither_arrivals_nor_lengths() -> None:
    few = replace(MANY, duration_s=1.0, cold_share=0.1)

    def rest(arrival: Arrival) -> tuple[float, int, int, int]:
        return arrival.at_s, arrival.prompt_tokens, arrival.output_tokens, arrival.tenant

    one, many = (draw(replace(few, adapters=n, alpha=a)) for n, a in ((1, 1.0), (1000, 0.1)))
    assert list(map(rest, one)) == list(map(rest, many))
    bursts = draw(replace(few, cv=4.0))
    named = [(a.adapter, a.prompt_tokens, a.output_tokens) for a in draw(few)]
    assert named == [(a.adapter, a.prompt_tokens, a.output_tokens) for a in bursts]


def test_a_plan_is_written_whole(tmp_path: Path) -> None:
    few = replace(MANY, duration_s=0.1)
    plan = draw(few)
    digest = traffic.write_plan(few, plan, tmp_path / "plans" / "x.jsonl")
    first, *lines = (tmp_path / "plans" / "x.jsonl").read_text().splitlines()
    assert Traffic.read(json.loads(first)) == few
    assert [Arrival(**json.loads(line)) for line in lines] == plan
    assert traffic.write_plan(few, draw(few), tmp_path / "again.jsonl") == digest
    assert [json.loads(line) for line in lines] == [asdict(arrival) for arrival in plan]


def test_prompts_are_their_own_and_as_long_as_asked() -> None:
    ids = traffic.prompt_ids(1, 2, 300, 512)
    assert len(ids) == 300 and min(ids) >= 10 and max(ids) < 512
    assert ids == traffic.prompt_ids(1, 2, 300, 512) != traffic.prompt_ids(1, 3, 300, 512)
    words = traffic.prompt_words(1, 2, 30)
    assert len(words.split()) == 30 and words != traffic.prompt_words(2, 2, 30)


@pytest.mark.parametrize(
    "table",
    [
        {"alpha": 0},
        {"rate": -1.0},
        {"cv": 0},
        {"duration_s": float("nan")},
        {"prompt": [5, 5]},
        {"output": [0, 5]},
        {"ranks": []},
        {"tenants": 0},
        {"cold_share": 1.5},
        {"cold_share": 0.1, "adapters": 0},
        {"adaptors": 3},
    ],
)
def test_what_cannot_be_drawn_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(table)).rstrip("s")):
        Traffic.read(table)
