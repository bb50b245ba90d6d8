"""The base GEMM, ``out = x W^T``, with the row invariance the exactness contract promises.

A BLAS picks its kernel, and how it splits the inner dimension, by the shape of the whole product:
left alone, a row's last bits change with the number of rows around it. (Measured with MKL 2024.2 on
AVX-512, float32, inner size 1536, two threads: 1, 2-15, 16-56 and 57-192 rows give four different
results.) Two measures remove every such choice:

* the inner dimension is cut here, in blocks of ``INNER_BLOCK``, which the BLAS no longer splits;
* there are at least ``MIN_ROWS`` rows, below which it uses kernels with another summation order.

Then every element is the same chain of fused multiply-adds over each block, the blocks added in
order, for any number of rows from ``MIN_ROWS`` up and any number of threads. A larger block would
need more rows (256: 11, 384: 16), which a small decode batch would pay for.
"""

from __future__ import annotations

import torch

INNER_BLOCK = 128
MIN_ROWS = 8


def padded(rows: int) -> int:
    """The number of rows ``project`` must be given for ``rows`` real ones."""
    return max(rows, MIN_ROWS)


def project(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``out[T, n] = x[T, k] @ weight[n, k]^T``, nothing allocated; on a CPU ``T >= MIN_ROWS``."""
    transposed = weight.t()
    if x.device.type != "cpu":
        torch.mm(x, transposed, out=out)
        return
    assert x.shape[0] >= MIN_ROWS
    torch.mm(x[:, :INNER_BLOCK], transposed[:INNER_BLOCK], out=out)
    for start in range(INNER_BLOCK, x.shape[1], INNER_BLOCK):
        end = start + INNER_BLOCK
        out.addmm_(x[:, start:end], transposed[start:end])
