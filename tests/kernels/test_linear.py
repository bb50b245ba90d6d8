"""The base matmul: an element is one chain of multiply-adds, whatever else is in the batch."""

from __future__ import annotations

import random
from typing import Any

import numba
import numpy as np
import pytest
import torch

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import set_num_threads
from loramux_kernels.linear import Matrix, gather, project
from loramux_kernels.linear.cpu import INNER_BLOCK, panel_with
from loramux_kernels.testing import assert_same

ROWS = 520
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def callable_panel(*, wide: bool) -> Any:
    """A panel's work as Python may call it: it is compiled for compiled callers alone."""
    panel = panel_with(simd.load, wide=wide)
    return numba.njit(lambda *args: panel(*args))


WIDE_PANEL, NARROW_PANEL = callable_panel(wide=True), callable_panel(wide=False)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def defined(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What ``project`` promises: fused multiply-adds along each block, then the blocks in order.

    A block that is not full comes first. A fused multiply-add rounds once, which float64 does here
    for float32 factors; rounding twice differs only within half a unit of float64, about once in
    2^29 steps.
    """
    xs, ws = x.numpy().astype(np.float64), weight.double().numpy()
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


def result(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    out = torch.full((len(x), weight.width_out), torch.nan)
    project(out, x, weight)
    return out


@pytest.mark.parametrize(
    ("width_in", "width_out"),
    [(1, 1), (33, 17), (64, 96), (128, 64), (129, 40), (576, 192), (1536, 576)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_among_any_number_of_rows(
    width_in: int, width_out: int, threads: int
) -> None:
    set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    weight = Matrix.of(numbers(width_out, width_in, seed=width_in))
    x = numbers(ROWS, width_in, seed=width_in + 1)
    everything = result(x, weight)
    source = random.Random(0)
    for rows in [*range(1, 41), 63, 64, 65, 128, 255, 257, 511, ROWS]:
        first = source.randint(0, ROWS - rows)
        here = slice(first, first + rows)
        assert torch.equal(result(x[here], weight), everything[here]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("width_in", [1, 5, INNER_BLOCK, INNER_BLOCK + 1, 300])
@pytest.mark.parametrize("width_out", [1, 16, 17, 32, 37])
def test_the_sum_is_the_one_defined(
    rows: int, width_in: int, width_out: int, dtype: torch.dtype
) -> None:
    """Half-precision weights are widened exactly: the sum is over what the file says."""
    dense = numbers(width_out, width_in, seed=rows).to(dtype)
    x = numbers(rows, width_in, seed=rows + 1)
    assert_same(result(x, Matrix.of(dense)), defined(x, dense))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 13, 23])
def test_wide_and_narrow_tiles_give_the_same_bits(rows: int) -> None:
    """A machine compiles one of them; the other's users see the same."""
    dense, x = numbers(32, 300, seed=rows), numbers(rows, 300, seed=rows + 1)
    data, outs = Matrix.of(dense).data.view(-1).numpy(), []
    for panel in (WIDE_PANEL, NARROW_PANEL):
        out = np.full(rows * 32, np.nan, np.float32)
        nothing, sums = np.empty(0, np.float32), np.empty(32 * 32, np.float32)
        panel(0, out, 32, x.numpy().reshape(-1), (rows, 300), data, nothing, sums)
        outs.append(torch.from_numpy(out).view(rows, 32))
    assert_same(outs[0], outs[1])
    assert_same(outs[0], defined(x, dense))


def test_no_rows_are_no_work() -> None:
    assert result(torch.empty(0, 5), Matrix.of(torch.ones(3, 5))).shape == (0, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(backend: dispatch.Backend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(-4, 5, (31, 300), generator=generator)
    x = torch.randint(-4, 5, (11, 300), generator=generator)
    with dispatch.using(backend):
        out = result(x.float(), Matrix.of(dense.to(dtype)))
    assert torch.equal(out.long(), x @ dense.T)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_found_again(backend: dispatch.Backend, dtype: torch.dtype) -> None:
    dense = numbers(71, 19, seed=0).to(dtype)
    ids = torch.tensor([0, 15, 16, 31, 32, 63, 64, 70, 3, 3])
    out = torch.full((len(ids), 19), torch.nan)
    with dispatch.using(backend):
        gather(out, Matrix.of(dense), ids)
    assert_same(out, dense[ids].float())


def test_a_matrix_is_written_in_any_pieces() -> None:
    dense = numbers(150, 7, seed=0)
    for pieces in ([150], [1] * 150, [31, 2, 64, 53], [5, 96, 49]):
        matrix = Matrix.empty(150, 7, torch.float32, torch.device("cpu"))
        first = 0
        for size in pieces:
            matrix.write(first, dense[first : first + size])
            first += size
        assert_same(matrix.dense(), dense)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_int8_is_its_whole_numbers_times_scales(backend: dispatch.Backend) -> None:
    dense = numbers(75, 130, seed=0) * torch.logspace(-3, 3, 75)[:, None]
    dense[5] = 0
    matrix = Matrix.of(dense, torch.int8)
    assert matrix.nbytes < dense.nbytes / 3
    step = dense.abs().amax(dim=1, keepdim=True) / 127
    assert ((matrix.dense() - dense).abs() <= step * 0.501).all()
    x = numbers(11, 130, seed=1)
    expected = x.double() @ matrix.dense().double().T
    with dispatch.using(backend):
        out = result(x, matrix)
        found = torch.empty(3, 130)
        gather(found, matrix, torch.tensor([5, 74, 33]))
    size = x.double().abs() @ matrix.dense().double().abs().T
    assert ((out - expected).abs() <= 1e-5 * size + 1e-30).all()
    assert_same(found, matrix.dense()[[5, 74, 33]])


def test_an_int8_row_is_the_same_bits_among_any_number_of_rows() -> None:
    matrix = Matrix.of(numbers(96, 300, seed=0), torch.int8)
    x = numbers(40, 300, seed=1)
    everything = result(x, matrix)
    for rows in (1, 7, 8, 9, 33):
        assert torch.equal(result(x[:rows], matrix), everything[:rows]), rows


@pytest.mark.parametrize(
    ("out", "x"), [((2, 3), (2, 4)), ((2, 4), (2, 5)), ((1, 3), (2, 5))], ids=str
)
def test_shapes_that_do_not_fit_are_refused(out: tuple[int, int], x: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="project"):
        project(torch.zeros(out), torch.zeros(x), Matrix.of(torch.zeros(3, 5)))
