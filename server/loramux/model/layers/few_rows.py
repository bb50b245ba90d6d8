"""The base GEMM for a decode batch: one pass over the weights, bound by reading them.

A BLAS repacks the weights on every call, which a large batch pays back and a decode never does.
Here the lanes of a vector are token rows, so a weight is read once, as it lies in memory, and used
by sixteen rows. Each element is the same chain of multiply-adds as everywhere (see ``linear``).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from loramux_kernels.jit import inner, parallel
from loramux_kernels.simd import LANES, add, fma, load, splat, store

_TILE = 8
"""Output columns of a work item: with two multiply-adds a cycle, four cycles each, eight
independent chains keep the multipliers busy."""


@inner
def _add_block(
    sums: Any, to: int, w: Any, w_at: int, w_stride: int, x: Any, x_at: int, x_stride: int, n: int
) -> None:
    """Add one inner block of eight columns, sixteen rows each, to ``sums[to:]``."""
    zero = splat(np.float32(0))
    a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
    w0, w1, w2, w3 = w_at, w_at + w_stride, w_at + 2 * w_stride, w_at + 3 * w_stride
    w4, w5, w6, w7 = w0 + 4 * w_stride, w1 + 4 * w_stride, w2 + 4 * w_stride, w3 + 4 * w_stride
    for k in range(n):
        v = load(x, x_at + k * x_stride)
        a = fma(splat(w[w0 + k]), v, a)
        b = fma(splat(w[w1 + k]), v, b)
        c = fma(splat(w[w2 + k]), v, c)
        d = fma(splat(w[w3 + k]), v, d)
        e = fma(splat(w[w4 + k]), v, e)
        f = fma(splat(w[w5 + k]), v, f)
        g = fma(splat(w[w6 + k]), v, g)
        h = fma(splat(w[w7 + k]), v, h)
    store(sums, to, add(load(sums, to), a))
    store(sums, to + LANES, add(load(sums, to + LANES), b))
    store(sums, to + 2 * LANES, add(load(sums, to + 2 * LANES), c))
    store(sums, to + 3 * LANES, add(load(sums, to + 3 * LANES), d))
    store(sums, to + 4 * LANES, add(load(sums, to + 4 * LANES), e))
    store(sums, to + 5 * LANES, add(load(sums, to + 5 * LANES), f))
    store(sums, to + 6 * LANES, add(load(sums, to + 6 * LANES), g))
    store(sums, to + 7 * LANES, add(load(sums, to + 7 * LANES), h))


@parallel("void(float32[:,::1], float32[:,::1], float32[:,::1], int64)")
def project_few(out: Any, x: Any, weight: Any, inner_block: int) -> None:
    """``out[T, n] = x[T, k] @ weight[n, k]^T``; float32, contiguous, ``n >= 8``."""
    rows, width_in = x.shape
    width_out = weight.shape[0]
    groups = (rows + LANES - 1) // LANES
    stride = groups * LANES
    turned = np.zeros(width_in * stride, np.float32)
    for k in range(width_in):
        for row in range(rows):
            turned[k * stride + row] = x[row, k]
    flat = weight.reshape(-1)
    for tile in numba.prange((width_out + _TILE - 1) // _TILE):
        # the last tile may overlap the one before it: both write the same bits
        first = min(tile * _TILE, width_out - _TILE)
        sums = np.zeros(groups * _TILE * LANES, np.float32)
        begin = 0
        while begin < width_in:
            # the odd block comes first, as in linear
            count = inner_block if (width_in - begin) % inner_block == 0 else width_in % inner_block
            for group in range(groups):
                x_at = begin * stride + group * LANES
                to = group * _TILE * LANES
                _add_block(
                    sums, to, flat, first * width_in + begin, width_in, turned, x_at, stride, count
                )
            begin += count
        for row in range(rows):
            at = row // LANES * _TILE * LANES + row % LANES
            for column in range(_TILE):
                out[row, first + column] = sums[at + column * LANES]
