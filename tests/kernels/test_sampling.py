"""Keyed sampling on the CPU: equal to the reference, right in distribution, blind to neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loramux_kernels.sampling import DrawParams, cpu, draw, reference, stream_key

torch.set_num_threads(1)

SIZES = (1, 3, 5, 127, 128, 129, 300)
LOGIT = st.one_of(
    st.sampled_from([-math.inf, -3.0, -0.0, 0.0, 0.5, 1.0, 7.0, 30.0]),
    st.floats(-60, 60, width=16),
)


def params(
    rows: int,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> DrawParams:
    return DrawParams(
        temperature=np.full(rows, temperature, np.float64),
        log_min_p=np.full(rows, math.log(min_p) if min_p else -math.inf),
        top_k=np.full(rows, top_k, np.int64),
        top_p=np.full(rows, top_p, np.float64),
        key=np.full(rows, stream_key(seed, 0), np.uint64),
    )


@st.composite
def rows_of_logits(draw_from: st.DrawFn) -> torch.Tensor:
    """Few rows, many ties, any size around the group size."""
    size = draw_from(st.sampled_from(SIZES))
    values = draw_from(st.lists(LOGIT, min_size=1, max_size=8))
    seed = draw_from(st.integers(0, 1000))
    picks = np.random.default_rng(seed).integers(len(values), size=(3, size))
    return torch.tensor(np.asarray(values, np.float32)[picks])


@given(
    logits=rows_of_logits(),
    temperature=st.sampled_from([0.0, 1e-300, 0.01, 0.7, 1.0, 3.0, 1e300]),
    min_p=st.sampled_from([0.0, 1e-9, 0.05, 0.5, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 3, 50, 128, 10_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1 - 1e-15, 1.0]),
    position=st.integers(0, 2**40),
)
@example(torch.zeros(1, 5), 1.0, 0.0, 0, 0.2, 0)
@example(torch.tensor([[0.0, -0.0, -0.0, 0.0, -1.0]]), 1.0, 1.0, 3, 0.4, 0)
@example(torch.full((1, 129), -math.inf), 1.0, 0.1, 3, 0.9, 0)
@settings(deadline=None, max_examples=300)
def test_cpu_equals_reference(
    logits: torch.Tensor,
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    position: int,
) -> None:
    # Over 10 s only where the kernels are not in numba's cache yet: they compile here.
    rows = len(logits)
    how = params(rows, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    at = np.arange(position, position + rows, dtype=np.int64)
    expected, expected_bad = reference.draw(logits, how, at)
    drawn, bad = cpu.draw(logits, how, at)
    assert drawn.tolist() == expected.tolist()
    assert bad.tolist() == expected_bad.tolist() == logits.isneginf().all(dim=1).tolist()
    if temperature > 0:
        ends = zip(*reference.cut(logits, how), strict=True)
        for row, (logit, last) in zip(logits.numpy(), ends, strict=True):
            if np.isfinite(row).any():
                assert kept_by_cpu(row, how) == [
                    i
                    for i, value in enumerate(row)
                    if value > logit or (value == logit and i <= last)
                ]


def kept_by_cpu(row: NDArray[np.float32], how: DrawParams) -> list[int]:
    maxima = cpu._new_maxima(row)
    cpu._maxima(row, maxima)
    fields = (how.temperature[0], how.log_min_p[0], how.top_k[0], how.top_p[0])
    cut = cpu._cut(row, maxima, *fields)
    return [i for i, value in enumerate(row) if cpu._rank_key(value, i) <= cut]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 7}, {"top_k": 45}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_cpu_equals_reference_on_long_rows(scale: float, filters: dict[str, float]) -> None:
    logits = torch.randn(3, 5003, generator=torch.Generator().manual_seed(1)) * scale
    logits[2, 5002] = 6 * scale  # the last id of all, in a group of its own size
    how = params(3, temperature=0.8, **filters)  # type: ignore[arg-type]
    for start in range(0, 30, 3):
        at = np.arange(start, start + 3)
        assert cpu.draw(logits, how, at)[0].tolist() == reference.draw(logits, how, at)[0].tolist()


@pytest.mark.parametrize("scale", [0.0, 0.01])
@pytest.mark.parametrize("top_k", [0, 9_000])
@pytest.mark.parametrize("top_p", [0.37, 0.999])
def test_mass_beyond_the_integers_of_float64(scale: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 20_011, generator=torch.Generator().manual_seed(2)) * scale
    how = params(1, top_k=top_k, top_p=top_p)  # 20,011 weights near 2^40: over 2^53 in all
    logit, last = (end.item() for end in reference.cut(logits, how))
    row = logits[0].numpy()
    expected = np.flatnonzero((row > logit) | ((row == logit) & (np.arange(20_011) <= last)))
    assert kept_by_cpu(row, how) == expected.tolist()


def distribution(
    logits: NDArray[np.float64], temperature: float, top_p: float
) -> NDArray[np.float64]:
    """Softmax of the smallest set of mass top_p, in numpy and by a sort."""
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    size = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    out = np.zeros_like(p)
    out[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    return out


def chi_square_fits(counts: NDArray[np.int64], p: NDArray[np.float64]) -> bool:
    """Five standard deviations of the statistic; ids expected less than 10 times are pooled."""
    expected = p * counts.sum()
    if counts[p == 0].any():
        return False
    large = expected >= 10
    seen = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = max(len(seen) - 1, 1)
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [5, 131, 1030])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_frequencies_follow_the_distribution(size: int, temperature: float, top_p: float) -> None:
    row = np.random.default_rng(size).normal(0, 1.5, size).astype(np.float32)
    draws, step = 24_000, 4_000
    counts = np.zeros(size, np.int64)
    logits = torch.from_numpy(row).expand(step, size).contiguous()
    how = params(step, temperature=temperature, top_p=top_p, seed=11)
    for start in range(0, draws, step):
        drawn, _ = draw(logits, how, np.arange(start, start + step))
        counts += np.bincount(drawn, minlength=size)
    assert chi_square_fits(counts, distribution(row.astype(np.float64), temperature, top_p))
    assert not chi_square_fits(
        counts, distribution(row.astype(np.float64), temperature * 1.25, top_p)
    )


def test_choices_and_seeds_are_independent_streams() -> None:
    rows = 4_000
    logits = torch.zeros(rows, 16)
    at = np.arange(rows)
    streams = []
    for seed, choice in [(5, 0), (5, 1), (6, 7), (2**63, 0)]:
        how = params(rows)
        how.key[:] = stream_key(seed, choice)
        streams.append(draw(logits, how, at)[0])
    for i, one in enumerate(streams):
        for other in streams[:i]:
            joint = np.bincount(16 * one + other, minlength=256)
            assert chi_square_fits(joint, np.full(256, 1 / 256))
    assert stream_key(5, 1) == stream_key(6, 0)  # the contract adds the choice to the seed


def test_a_row_does_not_see_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    pool = torch.from_numpy(rng.normal(0, 3, (40, 517)).astype(np.float32))
    pool[7] = torch.nan
    how = DrawParams(
        temperature=rng.choice([0.0, 0.5, 1.0], 40),
        log_min_p=np.log(rng.choice([1e-30, 0.05], 40)),
        top_k=rng.choice([0, 3, 200], 40).astype(np.int64),
        top_p=rng.choice([0.6, 1.0], 40),
        key=rng.integers(0, 2**64, 40, dtype=np.uint64),
    )
    at = rng.integers(0, 1000, 40)
    alone = [int(draw(pool[i : i + 1], pick(how, [i]), at[[i]])[0][0]) for i in range(40)]
    for _ in range(50):
        batch = rng.integers(0, 40, rng.integers(1, 12))
        drawn, bad = draw(pool[torch.from_numpy(batch)], pick(how, batch), at[batch])
        assert drawn.tolist() == [alone[i] for i in batch]
        assert bad.tolist() == [i == 7 for i in batch]


def pick(how: DrawParams, rows: NDArray[np.int64] | list[int]) -> DrawParams:
    return DrawParams(
        how.temperature[rows], how.log_min_p[rows], how.top_k[rows], how.top_p[rows], how.key[rows]
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001, 0x7F800000])
@pytest.mark.parametrize("at", [0, 128, 299])
def test_bad_rows_are_reported(temperature: float, bits: int, at: int) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits.view(torch.int32)[1, at] = bits  # NaNs of both signs, a signalling one, +inf
    for implementation in (cpu, reference):
        drawn, bad = implementation.draw(logits, params(3, temperature=temperature), np.arange(3))
        assert bad.tolist() == [False, True, False]
        assert drawn[1] == -1 and (drawn[[0, 2]] >= 0).all()


def test_greedy_takes_the_lowest_id_of_the_greatest_logit() -> None:
    for at in (0, 5, 127, 128, 299):
        logits = torch.full((1, 300), -1.0)
        logits[0, at:] = 0.0
        logits[0, at] = -0.0
        for implementation in (cpu, reference):
            drawn, _ = implementation.draw(
                logits, params(1, temperature=0.0), np.zeros(1, np.int64)
            )
            assert drawn[0] == at


def test_no_rows() -> None:
    drawn, bad = draw(torch.empty(0, 9), params(0), np.zeros(0, np.int64))
    assert drawn.shape == bad.shape == (0,)
