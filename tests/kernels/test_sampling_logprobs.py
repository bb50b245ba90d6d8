"""Log-softmax, ranks and top lists of raw logits: numba equal to torch, and to a sort by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_kernels.sampling import cpu, logprobs, reference

torch.set_num_threads(1)


@given(
    size=st.sampled_from([1, 3, 5, 127, 129, 300]),
    values=st.lists(
        st.one_of(st.just(-math.inf), st.floats(-60, 60, width=16)), min_size=1, max_size=9
    ),
    count=st.sampled_from([0, 1, 2, 20, 400]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
def test_logprobs_by_hand(size: int, values: list[float], count: int, seed: int) -> None:
    # Over 10 s only where the kernels are not in numba's cache yet: they compile here.
    rng = np.random.default_rng(seed)
    logits = np.asarray(values, np.float32)[rng.integers(len(values), size=(3, size))]
    ids = rng.integers(size, size=3)
    counts = np.array([count, 0, min(count, 2)])
    for implementation in (cpu, reference):
        out = implementation.logprobs(torch.from_numpy(logits), ids, counts)
        assert out.top_ids.shape == out.top.shape == (3, count)
        for r, row in enumerate(logits.astype(np.float64)):
            if not np.isfinite(row).any():
                assert math.isnan(out.chosen[r]) and out.rank[r] == 0
                assert (out.top_ids[r] == -1).all()
                continue
            order = sorted(range(size), key=lambda i: (-row[i], i))
            # exp within 2 ulps and a sum of at most 300 terms leave 1e-13 with room to spare.
            expected = row - row.max() - math.log(np.exp(row - row.max()).sum())
            assert out.chosen[r] == pytest.approx(expected[ids[r]], rel=1e-13, abs=1e-13)
            assert out.rank[r] == order.index(ids[r]) + 1
            listed = order[: counts[r]]
            assert out.top_ids[r].tolist() == listed + [-1] * (count - len(listed))
            wanted = expected[listed].tolist() + [-math.inf] * (count - len(listed))
            assert out.top[r].tolist() == pytest.approx(wanted, rel=1e-13, abs=1e-13)


def test_a_row_does_not_see_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.normal(0, 4, (20, 1031)).astype(np.float32))
    ids, counts = rng.integers(1031, size=20), rng.integers(0, 30, size=20)
    alone = [logprobs(pool[i : i + 1], ids[[i]], counts[[i]]) for i in range(20)]
    for _ in range(30):
        batch = rng.integers(20, size=rng.integers(1, 9))
        out = logprobs(pool[torch.from_numpy(batch)], ids[batch], counts[batch])
        for row, i in enumerate(batch):
            assert out.chosen[row] == alone[i].chosen[0]
            assert out.rank[row] == alone[i].rank[0]
            assert out.top_ids[row, : counts[i]].tolist() == alone[i].top_ids[0].tolist()
            assert out.top[row, : counts[i]].tolist() == alone[i].top[0].tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_rows_have_no_logprobs(value: float) -> None:
    logits = torch.zeros(2, 200)
    logits[1, 199] = value
    for implementation in (cpu, reference):
        out = implementation.logprobs(logits, np.array([3, 3]), np.array([2, 2]))
        assert out.rank.tolist() == [4, 0]
        assert out.top_ids.tolist() == [[0, 1], [-1, -1]]
        assert math.isnan(out.chosen[1])
