"""Entropy in bits against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loramux_kernels.sampling import cpu_entropy, entropy_bits, reference

torch.set_num_threads(1)


@given(
    size=st.sampled_from([1, 2, 5, 127, 128, 129, 300]),
    values=st.lists(
        st.one_of(st.just(-math.inf), st.floats(-900, 900, width=16)), min_size=1, max_size=9
    ),
    seed=st.integers(0, 1000),
)
@example(size=300, values=[0.0, 741.0], seed=0)  # weights that vanish when they are divided
@settings(deadline=None, max_examples=200)
def test_entropy_by_definition(size: int, values: list[float], seed: int) -> None:
    # Over 10 s only where the kernels are not in numba's cache yet: they compile here.
    rng = np.random.default_rng(seed)
    logits = np.asarray(values, np.float32)[rng.integers(len(values), size=(3, size))]
    for implementation in (cpu_entropy, reference):
        out = implementation.entropy_bits(torch.from_numpy(logits))
        for bits, row in zip(out.tolist(), logits.astype(np.float64), strict=True):
            if not np.isfinite(row).any():
                assert math.isnan(bits)
                continue
            weights = np.exp(row - row.max())
            p = weights / weights.sum()
            p = p[p > 0]
            assert bits == pytest.approx(-float((p * np.log2(p)).sum()), rel=1e-12, abs=1e-12)
            assert bits >= 0.0


@pytest.mark.parametrize("implementation", [cpu_entropy, reference])
def test_what_is_certain_has_none_and_what_is_even_all(implementation: object) -> None:
    logits = torch.full((3, 256), -math.inf)
    logits[0, 255] = -3.0
    logits[1] = 7.5
    logits[2, [0, 130]] = 80.0
    assert implementation.entropy_bits(logits).tolist() == pytest.approx([0.0, 8.0, 1.0], rel=1e-15)  # type: ignore[attr-defined]


def test_a_row_does_not_see_its_neighbours() -> None:
    pool = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) * 4
    alone = [entropy_bits(pool[i : i + 1])[0] for i in range(20)]
    rng = np.random.default_rng(0)
    for _ in range(30):
        batch = rng.integers(20, size=rng.integers(0, 9))
        assert entropy_bits(pool[torch.from_numpy(batch)]).tolist() == [alone[i] for i in batch]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_rows_have_none(value: float) -> None:
    logits = torch.zeros(2, 200)
    logits[1, 199] = value
    for implementation in (cpu_entropy, reference):
        bits = implementation.entropy_bits(logits)
        assert bits[0] == pytest.approx(math.log2(200)) and math.isnan(bits[1])
