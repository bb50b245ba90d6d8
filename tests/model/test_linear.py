"""The base GEMM: an element is one chain of multiply-adds, whatever else is in the batch."""

from __future__ import annotations

import random

import numba
import numpy as np
import pytest
import torch

from loramux.model.layers import linear
from loramux.model.layers.few_rows import project_few
from loramux.model.layers.linear import FEW_ROWS, INNER_BLOCK, MIN_ROWS, padded, project
from loramux_kernels.jit import set_num_threads

ROWS = 520


def defined(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What ``project`` promises: fused multiply-adds along each block, then the blocks in order.

    A block that is not full comes first. A fused multiply-add rounds once, which float64 does here
    for float32 factors; rounding twice differs only within half a unit of float64, about once in
    2^29 steps.
    """
    xs, ws = (t.numpy().astype(np.float64) for t in (x, weight))
    total = np.zeros((len(xs), len(ws)), np.float32)
    ends = range(xs.shape[1] % INNER_BLOCK or INNER_BLOCK, xs.shape[1] + 1, INNER_BLOCK)
    start = 0
    for end in ends:
        part = np.zeros_like(total)
        for k in range(start, end):
            part = (xs[:, k, None] * ws[None, :, k] + part).astype(np.float32)
        total += part
        start = end
    return torch.from_numpy(total)


def result(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x), len(weight)), torch.nan)
    project(out, x, weight)
    return out


@pytest.mark.parametrize(
    ("width_in", "width_out"),
    [(1, 1), (33, 17), (64, 96), (128, 64), (129, 40), (576, 192), (1536, 576), (2048, 512)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_among_any_number_of_rows(
    width_in: int, width_out: int, threads: int
) -> None:
    set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    generator = torch.Generator().manual_seed(width_in)
    weight = torch.randn(width_out, width_in, generator=generator)
    x = torch.randn(ROWS, width_in, generator=generator)
    everything = result(x, weight)
    source = random.Random(0)
    for rows in [*range(MIN_ROWS, 41), 63, 64, 65, 128, 255, 257, 511, ROWS]:
        first = source.randint(0, ROWS - rows)
        here = slice(first, first + rows)
        assert torch.equal(result(x[here], weight), everything[here]), rows


@pytest.mark.parametrize("rows", [MIN_ROWS, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("width_in", [1, 5, INNER_BLOCK, INNER_BLOCK + 1, 576])
def test_the_sum_is_the_one_defined(rows: int, width_in: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(37, width_in, generator=generator)
    x = torch.randn(rows, width_in, generator=generator)
    assert torch.equal(result(x, weight), defined(x, weight))


@pytest.mark.parametrize("rows", [1, 7, FEW_ROWS, 33])
@pytest.mark.parametrize("width_in", [1, INNER_BLOCK, INNER_BLOCK + 1, 300])
@pytest.mark.parametrize("width_out", [8, 9, 37])
def test_our_own_kernel_computes_the_sum_defined(rows: int, width_in: int, width_out: int) -> None:
    """On its own: ``project`` would quietly leave a broken kernel out and use the BLAS."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(width_out, width_in, generator=generator)
    x = torch.randn(rows, width_in, generator=generator)
    out = torch.full((rows, width_out), torch.nan)
    project_few(out.numpy(), x.numpy(), weight.numpy(), INNER_BLOCK)
    assert torch.equal(out, defined(x, weight))


def test_integers_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (31, 300), generator=generator).float()
    x = torch.randint(-4, 5, (11, 300), generator=generator).float()
    assert torch.equal(result(x, weight).double(), x.double() @ weight.double().T)


def test_small_batches_are_padded() -> None:
    assert [padded(rows) for rows in (0, 1, MIN_ROWS, 9)] == [MIN_ROWS, MIN_ROWS, MIN_ROWS, 9]


def test_another_blas_is_used_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the BLAS sums in its own order, our kernel keeps out of its way."""
    used: list[int] = []
    monkeypatch.setattr(linear, "_blas_sums_as_defined", lambda: False)
    monkeypatch.setattr(linear, "project_few", lambda *args: used.append(1))
    x, weight = torch.ones(MIN_ROWS, 20), torch.ones(9, 20)
    assert torch.equal(result(x, weight), torch.full((MIN_ROWS, 9), 20.0))
    assert not used
