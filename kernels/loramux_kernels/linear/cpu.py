"""The base matmul on the CPU: bound by reading the weights up to some twenty rows, then by FMAs.

A BLAS packs the weights anew on every call, which a decode never pays back; and it picks its
kernel, and how it splits the inner dimension, by the shape of the whole product, so that a row's
last bits change with the rows around it. (Measured with MKL 2024.2 on AVX-512, float32, inner size
1536, two threads: 1, 2-15, 16-56 and 57-192 rows give four different results.) Here every element
is, for any number of rows and threads,

    one chain of fused multiply-adds over each block of 128 of the inner dimension,
    the blocks added in order; an odd block comes first; at last the column's scale, if any.

Per panel of 32 columns: a block of weights (16 KiB) comes from memory once and stays in the first
cache while tiles of twelve and eight rows (four where registers are narrow) use it. Meanwhile the
lines of the next block are fetched into the second, one or two for each step of the first tiles, so
that memory never waits for the multipliers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import inlined, inner, parallel
from loramux_kernels.linear.matrix import DTYPES, PANEL, Matrix

INNER_BLOCK = 128
_HALF = simd.LANES


def project(out: torch.Tensor, x: torch.Tensor, weight: Matrix) -> None:
    """See :func:`loramux_kernels.linear.project`."""
    dispatch.calls["cpu:project"] += 1
    project_at(out.numpy(), x.numpy(), *_operands(weight))


def gather(out: torch.Tensor, weight: Matrix, ids: torch.Tensor) -> None:
    """See :func:`loramux_kernels.linear.gather`."""
    dispatch.calls["cpu:gather"] += 1
    _gather_at(out.numpy(), *_operands(weight), ids.numpy())


def _operands(weight: Matrix) -> tuple[Any, int, Any]:
    """The panels as bytes, since numpy knows no bfloat16; what they are; the scales."""
    data = weight.data.view(-1).view(torch.uint8).numpy()
    return data, DTYPES.index(weight.data.dtype), weight.scales.numpy()


@inlined
def _keep(sums: Any, to: int, fresh: bool, sum_: Any) -> None:
    """The first block's sums are stored, later ones are added."""
    simd.store(sums, to, sum_ if fresh else simd.add(simd.load(sums, to), sum_))


@inlined
def _four(x: Any, row: int, last: int, width_in: int, begin: int) -> Any:
    """Where four rows begin in ``x``; beyond the last row it is taken again."""
    return (
        min(row, last) * width_in + begin,
        min(row + 1, last) * width_in + begin,
        min(row + 2, last) * width_in + begin,
        min(row + 3, last) * width_in + begin,
    )


@inlined
def _four_steps(s: Any, x: Any, rows: Any, k: int, u: Any, v: Any) -> Any:
    """One multiply-add for each of four rows by 32 columns."""
    a, b = simd.broadcast(x, rows[0] + k), simd.broadcast(x, rows[1] + k)
    c, d = simd.broadcast(x, rows[2] + k), simd.broadcast(x, rows[3] + k)
    return (
        simd.fma(a, u, s[0]),
        simd.fma(a, v, s[1]),
        simd.fma(b, u, s[2]),
        simd.fma(b, v, s[3]),
        simd.fma(c, u, s[4]),
        simd.fma(c, v, s[5]),
        simd.fma(d, u, s[6]),
        simd.fma(d, v, s[7]),
    )


@inlined
def _keep_four(sums: Any, to: int, fresh: bool, s: Any) -> None:
    _keep(sums, to, fresh, s[0])
    _keep(sums, to + _HALF, fresh, s[1])
    _keep(sums, to + PANEL, fresh, s[2])
    _keep(sums, to + PANEL + _HALF, fresh, s[3])
    _keep(sums, to + 2 * PANEL, fresh, s[4])
    _keep(sums, to + 2 * PANEL + _HALF, fresh, s[5])
    _keep(sums, to + 3 * PANEL, fresh, s[6])
    _keep(sums, to + 3 * PANEL + _HALF, fresh, s[7])


def _wide(load: Any, *, twelve: bool) -> Any:
    """Twelve rows by 32 columns: 24 sums in the 32 registers of AVX-512. Or eight, for what twelve
    do not divide; those are often alone, so they fetch whole rows of the next block."""

    @inner
    def block(
        sums: Any,
        to: int,
        fresh: bool,
        w: Any,
        at: int,
        ahead: int,
        x: Any,
        row: int,
        last: int,
        width_in: int,
        begin: int,
        count: int,
    ) -> None:
        zero = simd.splat(np.float32(0))
        s = t = r = (zero, zero, zero, zero, zero, zero, zero, zero)
        s_rows = _four(x, row, last, width_in, begin)
        t_rows = _four(x, row + 4, last, width_in, begin)
        r_rows = _four(x, row + 8, last, width_in, begin)
        for k in range(count):
            u = load(w, at + k * PANEL)
            v = load(w, at + k * PANEL + _HALF)
            simd.prefetch(w, ahead + k * PANEL)
            s = _four_steps(s, x, s_rows, k, u, v)
            t = _four_steps(t, x, t_rows, k, u, v)
            if twelve:
                r = _four_steps(r, x, r_rows, k, u, v)
            else:
                simd.prefetch(w, ahead + k * PANEL + _HALF)
        _keep_four(sums, to, fresh, s)
        _keep_four(sums, to + 4 * PANEL, fresh, t)
        if twelve:
            _keep_four(sums, to + 8 * PANEL, fresh, r)

    return block


def _narrow(load: Any) -> Any:
    """Four rows by 32 columns, sixteen at a time: four sums of two registers each in the sixteen
    of AVX2, of four each in the 32 of NEON."""

    @inner
    def block(
        sums: Any,
        to: int,
        fresh: bool,
        w: Any,
        at: int,
        ahead: int,
        x: Any,
        row: int,
        last: int,
        width_in: int,
        begin: int,
        count: int,
    ) -> None:
        x0, x1, x2, x3 = _four(x, row, last, width_in, begin)
        for half in range(0, PANEL, _HALF):
            zero = simd.splat(np.float32(0))
            a, b, c, d = zero, zero, zero, zero
            for k in range(count):
                u = load(w, at + half + k * PANEL)
                simd.prefetch(w, ahead + half + k * PANEL)
                a = simd.fma(simd.broadcast(x, x0 + k), u, a)
                b = simd.fma(simd.broadcast(x, x1 + k), u, b)
                c = simd.fma(simd.broadcast(x, x2 + k), u, c)
                d = simd.fma(simd.broadcast(x, x3 + k), u, d)
            _keep(sums, to + half, fresh, a)
            _keep(sums, to + half + PANEL, fresh, b)
            _keep(sums, to + half + 2 * PANEL, fresh, c)
            _keep(sums, to + half + 3 * PANEL, fresh, d)

    return block


@inner
def _write(
    out: Any, column: int, width: int, sums: Any, at: int, rows: int, scales: Any, count: int
) -> None:
    """Sixteen columns or less of every row, scaled if the weights are."""
    if len(scales):
        scale = simd.load_part(scales, column, count)
        for row in range(rows):
            s = simd.mul(simd.load(sums, row * PANEL + at), scale)
            simd.store_part(out, row * width + column, s, count)
    else:
        for row in range(rows):
            s = simd.load(sums, row * PANEL + at)
            simd.store_part(out, row * width + column, s, count)


@inner
def _tiles(rows: int) -> Any:
    """How many tiles of twelve rows, as many as can be, and how many of eight: together no more
    than the next multiple of four (or eight)."""
    fours = max((rows + 3) // 4, 2)
    eights = -fours % 3
    return (fours - 2 * eights) // 3, eights


@inner
def _room(rows: int) -> int:
    """Sums of a panel, those of a tile's spare rows included."""
    return (rows + 7) // 8 * 8 * PANEL


def panel_with(load: Any, *, wide: bool) -> Any:
    """The work on one panel of weights that ``load`` widens, with room for ``_room(rows)`` sums.
    All tiles give the same bits; beyond the last row they take the last row again."""
    large = _wide(load, twelve=True) if wide else _narrow(load)
    small = _wide(load, twelve=False) if wide else large
    large_rows, small_rows = (12, 8) if wide else (4, 4)

    @inner
    def project(
        panel: int, out: Any, width_out: int, x: Any, shape: Any, w: Any, scales: Any, sums: Any
    ) -> None:
        rows, width_in = shape
        num_large, num_small = _tiles(rows) if wide else (0, (rows + 3) // 4)
        begin = 0
        while begin < width_in:
            odd = (width_in - begin) % INNER_BLOCK
            count = odd if odd else INNER_BLOCK
            at = (panel * width_in + begin) * PANEL
            row = 0
            for tile in range(num_large + num_small):
                ahead = at + count * PANEL + tile % 2 * _HALF
                step = (x, row, rows - 1, width_in, begin, count)
                if tile < num_large:
                    large(sums, row * PANEL, begin == 0, w, at, ahead, *step)
                    row += large_rows
                else:
                    small(sums, row * PANEL, begin == 0, w, at, ahead, *step)
                    row += small_rows
            begin += count
        column = panel * PANEL
        first, second = min(width_out - column, _HALF), min(width_out - column - _HALF, _HALF)
        _write(out, column, width_out, sums, 0, rows, scales, first)
        if second > 0:
            _write(out, column + _HALF, width_out, sums, _HALF, rows, scales, second)

    return project


def _row_with(load: Any) -> Any:
    """One row of the matrix, out of its panel."""

    @inner
    def gather(row: int, out: Any, w: Any, scales: Any, index: int, lanes: Any) -> None:
        width_in = out.shape[1]
        panel, column = index // PANEL, index % PANEL
        half = column // _HALF * _HALF
        scale = scales[index] if len(scales) else np.float32(1)
        for k in range(width_in):
            simd.store(lanes, 0, load(w, (panel * width_in + k) * PANEL + half))
            out[row, k] = scale * lanes[column - half]

    return gather


_panel_f32, _row_f32 = panel_with(simd.load, wide=simd.WIDE), _row_with(simd.load)
_panel_f16, _row_f16 = panel_with(simd.load_f16, wide=simd.WIDE), _row_with(simd.load_f16)
_panel_bf16, _row_bf16 = panel_with(simd.load_bf16, wide=simd.WIDE), _row_with(simd.load_bf16)
_panel_i8, _row_i8 = panel_with(simd.load_i8, wide=simd.WIDE), _row_with(simd.load_i8)


@parallel("void(float32[:,::1], float32[:,::1], uint8[::1], int64, float32[::1])")
def project_at(out: Any, x: Any, data: Any, dtype: int, scales: Any) -> None:
    """``data`` is of ``DTYPES[dtype]``."""
    f32, u16, i8 = data.view(np.float32), data.view(np.uint16), data.view(np.int8)
    shape, width = x.shape, out.shape[1]
    x, out = x.reshape(-1), out.reshape(-1)
    if shape[0] == 0:
        return
    for panel in numba.prange((width + PANEL - 1) // PANEL):
        sums = np.empty(_room(shape[0]), np.float32)
        if dtype == 0:
            _panel_f32(panel, out, width, x, shape, f32, scales, sums)
        elif dtype == 1:
            _panel_f16(panel, out, width, x, shape, u16, scales, sums)
        elif dtype == 2:
            _panel_bf16(panel, out, width, x, shape, u16, scales, sums)
        else:
            _panel_i8(panel, out, width, x, shape, i8, scales, sums)


@parallel("void(float32[:,::1], uint8[::1], int64, float32[::1], int64[::1])")
def _gather_at(out: Any, data: Any, dtype: int, scales: Any, ids: Any) -> None:
    f32, u16, i8 = data.view(np.float32), data.view(np.uint16), data.view(np.int8)
    for row in numba.prange(len(ids)):
        lanes = np.empty(_HALF, np.float32)
        if dtype == 0:
            _row_f32(row, out, f32, scales, ids[row], lanes)
        elif dtype == 1:
            _row_f16(row, out, u16, scales, ids[row], lanes)
        elif dtype == 2:
            _row_bf16(row, out, u16, scales, ids[row], lanes)
        else:
            _row_i8(row, out, i8, scales, ids[row], lanes)
