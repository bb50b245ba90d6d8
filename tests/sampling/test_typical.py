"""Typical acceptance against its formula, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.request import SamplingParams
from loramux.sampling.sampler import Sampler

VOCAB = 9


def passing(logits: list[float], params: SamplingParams) -> set[int]:
    """The tokens of one row that pass, in float64: temperature, then top_k, then top_p."""
    scaled = [value / params.temperature for value in logits]
    order = sorted(range(VOCAB), key=lambda token: (-logits[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weight = {token: math.exp(scaled[token] - max(scaled)) for token in order}
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weight[token]
        if mass >= params.top_p * sum(weight.values()):
            break
    total = sum(weight[token] for token in kept)
    p = {token: weight[token] / total for token in kept}
    entropy = -sum(value * math.log(value) for value in p.values())
    least = min(0.09, 0.3 * math.exp(-entropy))
    for value in p.values():
        # float64 either way, but in another order: nothing may hang on the last bit
        assert abs(value - least) > 1e-9
    return {token for token, value in p.items() if value > least}


STEEP, FLAT = st.integers(-12, 12), st.integers(-4, 4)
ROWS = st.lists(
    st.one_of(*(st.lists(logit, min_size=VOCAB, max_size=VOCAB) for logit in (STEEP, FLAT, FLAT))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=ROWS,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    bias=st.sampled_from([0.0, 5.0]),
)
def test_every_token_of_every_row(
    rows: list[list[int]], temperature: float, top_k: int, top_p: float, bias: float
) -> None:
    """Rows of several requests, some of whose tokens are judged; the distribution is the processed
    one, and what is drawn does not change."""
    params = SamplingParams(
        seed=1, temperature=temperature, top_k=top_k, top_p=top_p, logit_bias={2: bias}
    )
    sampler = Sampler(VOCAB, "cpu")
    names = [f"r{index}" for index in range(len(rows))]
    for name in names:
        sampler.add(name, params, (), ())
    logits = torch.tensor(rows, dtype=torch.float32) / 2
    asked = [(name, 0) for name in names]
    judged = [(row, token) for row in reversed(range(0, len(rows), 2)) for token in range(VOCAB)]
    result = sampler.start(logits, asked, judged=judged)()
    want = []
    for row in range(len(rows)):
        own = [value / 2 + (bias if token == 2 else 0) for token, value in enumerate(rows[row])]
        want.append(passing(own, params))
    assert result.typical == [token in want[row] for row, token in judged]
    assert result.token_ids.tolist() == sampler.sample(logits, asked).token_ids.tolist()
    assert sampler.sample(logits, asked).typical == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_typical_where_nothing_is_finite(value: float) -> None:
    sampler = Sampler(VOCAB, "cpu")
    sampler.add("r", SamplingParams(seed=1), (), ())
    logits = torch.full((2, VOCAB), value)
    logits[1] = 0
    judged = [(row, token) for row in range(2) for token in range(VOCAB)]
    result = sampler.start(logits, [("r", 0), ("r", 1)], judged=judged)()
    assert result.typical == [False] * VOCAB + [True] * VOCAB
    assert result.bad.tolist() == [True, False]
