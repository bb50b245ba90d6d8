"""``y += B h`` on the CPU: rows of y gather B's vectors in order, weights widened in registers.

A lone row takes one vector after the other, as one stream from memory. Rows of a block go four at
a time and take four vectors together, so that a sum is loaded and stored once for four of them, and
a weight is loaded once for four rows. The order of every sum is that of the vectors, either way.
"""

from __future__ import annotations

from typing import Any

from loramux_kernels import simd
from loramux_kernels.jit import inlined, inner
from loramux_kernels.lora.shrink import moved

_TOGETHER = 4


def expand_with(load: Any, itemsize: int) -> Any:
    """The work of one item, for weights of ``itemsize`` bytes that ``load`` widens."""

    @inlined
    def lone(
        w: Any,
        per_slice: int,
        slices: Any,
        place: int,
        within: int,
        y: Any,
        y_at: int,
        columns: int,
        factor: Any,
    ) -> None:
        """One vector for one row."""
        done = 0
        while done < columns:
            length = min(columns - done, per_slice - within)
            b = slices[place] // itemsize + within
            left = length % 16
            whole = length - left
            to = y_at + done
            for k in range(0, whole, 16):
                simd.store(y, to + k, simd.fma(factor, load(w, b + k), simd.load(y, to + k)))
            if left:
                s = simd.load_part(y, to + whole, left)
                simd.store_part(y, to + whole, simd.fma(factor, load(w, b + whole), s), left)
            done, place, within = done + length, place + 1, 0

    @inlined
    def four(s: Any, f: Any, b: Any) -> Any:
        s = simd.fma(f[1], b[1], simd.fma(f[0], b[0], s))
        return simd.fma(f[3], b[3], simd.fma(f[2], b[2], s))

    @inlined
    def factors(h: Any, at: int) -> Any:
        return (
            simd.broadcast(h, at),
            simd.broadcast(h, at + 1),
            simd.broadcast(h, at + 2),
            simd.broadcast(h, at + 3),
        )

    @inlined
    def together(
        w: Any,
        per_slice: int,
        slices: Any,
        place: int,
        within: int,
        padded: int,
        y: Any,
        y_at: int,
        y_stride: int,
        columns: int,
        h: Any,
        h_at: int,
        h_stride: int,
    ) -> None:
        """Four vectors for four rows."""
        p0, w0 = place, within
        p1, w1 = moved(p0, w0, padded, per_slice)
        p2, w2 = moved(p1, w1, padded, per_slice)
        p3, w3 = moved(p2, w2, padded, per_slice)
        f0, f1 = factors(h, h_at), factors(h, h_at + h_stride)
        f2, f3 = factors(h, h_at + 2 * h_stride), factors(h, h_at + 3 * h_stride)
        y0, y1, y2, y3 = y_at, y_at + y_stride, y_at + 2 * y_stride, y_at + 3 * y_stride
        done = 0
        while done < columns:
            length = min(columns - done, per_slice - max(max(w0, w1), max(w2, w3)))
            b0, b1 = slices[p0] // itemsize + w0, slices[p1] // itemsize + w1
            b2, b3 = slices[p2] // itemsize + w2, slices[p3] // itemsize + w3
            left = length % 16
            whole = length - left
            for k in range(0, whole, 16):
                b = load(w, b0 + k), load(w, b1 + k), load(w, b2 + k), load(w, b3 + k)
                s0 = four(simd.load(y, y0 + k), f0, b)
                s1 = four(simd.load(y, y1 + k), f1, b)
                s2 = four(simd.load(y, y2 + k), f2, b)
                s3 = four(simd.load(y, y3 + k), f3, b)
                simd.store(y, y0 + k, s0)
                simd.store(y, y1 + k, s1)
                simd.store(y, y2 + k, s2)
                simd.store(y, y3 + k, s3)
            if left:
                k = whole
                b = load(w, b0 + k), load(w, b1 + k), load(w, b2 + k), load(w, b3 + k)
                simd.store_part(y, y0 + k, four(simd.load_part(y, y0 + k, left), f0, b), left)
                simd.store_part(y, y1 + k, four(simd.load_part(y, y1 + k, left), f1, b), left)
                simd.store_part(y, y2 + k, four(simd.load_part(y, y2 + k, left), f2, b), left)
                simd.store_part(y, y3 + k, four(simd.load_part(y, y3 + k, left), f3, b), left)
            y0, y1, y2, y3 = y0 + length, y1 + length, y2 + length, y3 + length
            done += length
            p0, w0 = moved(p0, w0, length, per_slice)
            p1, w1 = moved(p1, w1, length, per_slice)
            p2, w2 = moved(p2, w2, length, per_slice)
            p3, w3 = moved(p3, w3, length, per_slice)

    @inner
    def expand(
        w: Any,
        per_slice: int,
        slices: Any,
        list_at: int,
        element: int,
        padded: int,
        vectors: int,
        y: Any,
        y_at: int,
        y_stride: int,
        columns: int,
        rows: int,
        h: Any,
        h_at: int,
        h_stride: int,
    ) -> None:
        """``y[row] += sum_j h[row, j] * B[j]``, j in order, for the columns from ``element``."""
        place = element // per_slice
        within = element - place * per_slice
        place += list_at
        shared = rows // _TOGETHER * _TOGETHER
        j = 0
        while j + _TOGETHER <= vectors:
            for row in range(0, shared, _TOGETHER):
                to, of = y_at + row * y_stride, h_at + row * h_stride + j
                together(
                    w,
                    per_slice,
                    slices,
                    place,
                    within,
                    padded,
                    y,
                    to,
                    y_stride,
                    columns,
                    h,
                    of,
                    h_stride,
                )
            for vector in range(_TOGETHER):
                for row in range(shared, rows):
                    factor = simd.broadcast(h, h_at + row * h_stride + j + vector)
                    to = y_at + row * y_stride
                    lone(w, per_slice, slices, place, within, y, to, columns, factor)
                place, within = moved(place, within, padded, per_slice)
            j += _TOGETHER
        for vector in range(j, vectors):
            for row in range(rows):
                factor = simd.broadcast(h, h_at + row * h_stride + vector)
                to = y_at + row * y_stride
                lone(w, per_slice, slices, place, within, y, to, columns, factor)
            place, within = moved(place, within, padded, per_slice)

    return expand
