"""The base GEMM, ``out = x W^T``, with the row invariance the exactness contract promises.

A BLAS picks its kernel, and how it splits the inner dimension, by the shape of the whole product:
left alone, a row's last bits change with the number of rows around it. (Measured with MKL 2024.2 on
AVX-512, float32, inner size 1536, two threads: 1, 2-15, 16-56 and 57-192 rows give four different
results.) Two measures remove every such choice:

* the inner dimension is cut here, in blocks of ``INNER_BLOCK``, which the BLAS no longer splits;
* there are at least ``MIN_ROWS`` rows, below which it uses kernels with another summation order.

Then every element is one chain of fused multiply-adds over each block, the blocks added in order,
for any number of rows from ``MIN_ROWS`` up and any number of threads. A larger block would need
more rows (256: 11, 384: 16), which a small decode batch would pay for. A sum that is written down
can also be computed by a kernel of our own, where that is faster.
"""

from __future__ import annotations

from functools import cache

import torch

from loramux.model.layers.few_rows import project_few

INNER_BLOCK = 128
MIN_ROWS = 8
FEW_ROWS = 16
_NARROWEST = 8  # columns; project_few's tile


def padded(rows: int) -> int:
    """The number of rows ``project`` must be given for ``rows`` real ones."""
    return max(rows, MIN_ROWS)


def project(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``out[T, n] = x[T, k] @ weight[n, k]^T``, all contiguous; on a CPU ``T >= MIN_ROWS``."""
    if x.device.type != "cpu":
        torch.mm(x, weight.t(), out=out)
    elif x.shape[0] <= FEW_ROWS and weight.shape[0] >= _NARROWEST and _blas_sums_as_defined():
        project_few(out.numpy(), x.numpy(), weight.numpy(), INNER_BLOCK)
    else:
        _project_blas(out, x, weight)


def _project_blas(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    assert x.shape[0] >= MIN_ROWS
    width, transposed = x.shape[1], weight.t()
    # The odd block comes first: were it last and a single column, it would be one multiply-add
    # into the total, rounded once instead of twice.
    first = width % INNER_BLOCK or INNER_BLOCK
    torch.mm(x[:, :first], transposed[:first], out=out)
    for start in range(first, width, INNER_BLOCK):
        end = start + INNER_BLOCK
        out.addmm_(x[:, start:end], transposed[start:end])


@cache
def _blas_sums_as_defined() -> bool:
    """Whether this machine's BLAS gives the bits of ``project_few``.

    One that sums in another order is as good, but then the two must not take turns.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, width_in, width_out in ((MIN_ROWS, 300, 40), (FEW_ROWS, 512, 264), (40, 576, 96)):
        x = torch.randn(rows, width_in, generator=generator)
        weight = torch.randn(width_out, width_in, generator=generator)
        blas, ours = torch.empty(rows, width_out), torch.empty(rows, width_out)
        _project_blas(blas, x, weight)
        project_few(ours.numpy(), x.numpy(), weight.numpy(), INNER_BLOCK)
        if not torch.equal(blas, ours):
            return False
    return True
