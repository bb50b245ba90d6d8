"""``h = A x`` on the CPU: one dot product per row and vector of A, weights widened in registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from loramux_kernels import simd
from loramux_kernels.jit import inlined, inner


@inlined
def moved(place: int, within: int, by: int, per_slice: int) -> Any:
    """A place in an adapter's stream, ``by`` elements on: which slice, and where in it."""
    within += by
    while within >= per_slice:
        within -= per_slice
        place += 1
    return place, within


@inlined
def place_of(slices: Any, list_at: int, per_slice: int, itemsize: int, element: int) -> Any:
    """Where in the pool, in elements, an element of the stream that begins at ``slices[list_at]``
    lies."""
    return slices[list_at + element // per_slice] // itemsize + element % per_slice


def shrink_with(load: Any, itemsize: int) -> Any:
    """The work of one item, for weights of ``itemsize`` bytes that ``load`` widens."""

    # Vectors are read one after the other, so that the hardware sees one stream to prefetch; four
    # accumulators over neighbouring lanes keep the multipliers busy meanwhile.
    @inlined
    def four(w: Any, at: int) -> Any:
        return load(w, at), load(w, at + 16), load(w, at + 32), load(w, at + 48)

    @inlined
    def dot(s: Any, x: Any, at: int, a: Any) -> Any:
        return (
            simd.fma(simd.load(x, at), a[0], s[0]),
            simd.fma(simd.load(x, at + 16), a[1], s[1]),
            simd.fma(simd.load(x, at + 32), a[2], s[2]),
            simd.fma(simd.load(x, at + 48), a[3], s[3]),
        )

    @inlined
    def rest(s: Any, x: Any, at: int, w: Any, a: int, length: int) -> Any:
        first = s[0]
        for k in range(0, length, 16):
            part = simd.load_part(x, at + k, min(16, length - k))
            first = simd.fma(part, load(w, a + k), first)
        return first, s[1], s[2], s[3]

    @inlined
    def summed(s: Any) -> Any:
        return simd.add(simd.add(s[0], s[1]), simd.add(s[2], s[3]))

    @inlined
    def four_rows(
        w: Any,
        per_slice: int,
        slices: Any,
        place: int,
        within: int,
        x: Any,
        x0: int,
        x_stride: int,
        width: int,
    ) -> Any:
        """One vector with four rows, lanes not yet folded: they share each widened weight."""
        zero = simd.splat(np.float32(0))
        s0 = s1 = s2 = s3 = (zero, zero, zero, zero)
        x1, x2, x3 = x0 + x_stride, x0 + 2 * x_stride, x0 + 3 * x_stride
        done = 0
        while done < width:
            length = min(width - done, per_slice - within)
            a = slices[place] // itemsize + within
            whole = length // 64 * 64
            for k in range(0, whole, 64):
                v = four(w, a + k)
                s0 = dot(s0, x, x0 + done + k, v)
                s1 = dot(s1, x, x1 + done + k, v)
                s2 = dot(s2, x, x2 + done + k, v)
                s3 = dot(s3, x, x3 + done + k, v)
            if whole < length:
                at = done + whole
                s0 = rest(s0, x, x0 + at, w, a + whole, length - whole)
                s1 = rest(s1, x, x1 + at, w, a + whole, length - whole)
                s2 = rest(s2, x, x2 + at, w, a + whole, length - whole)
                s3 = rest(s3, x, x3 + at, w, a + whole, length - whole)
            done, place, within = done + length, place + 1, 0
        return summed(s0), summed(s1), summed(s2), summed(s3)

    @inlined
    def one_row(
        w: Any, per_slice: int, slices: Any, place: int, within: int, x: Any, x0: int, width: int
    ) -> Any:
        zero = simd.splat(np.float32(0))
        s = (zero, zero, zero, zero)
        done = 0
        while done < width:
            length = min(width - done, per_slice - within)
            a = slices[place] // itemsize + within
            whole = length // 64 * 64
            for k in range(0, whole, 64):
                s = dot(s, x, x0 + done + k, four(w, a + k))
            if whole < length:
                s = rest(s, x, x0 + done + whole, w, a + whole, length - whole)
            done, place, within = done + length, place + 1, 0
        return simd.total(summed(s))

    @inner
    def shrink(
        w: Any,
        per_slice: int,
        slices: Any,
        list_at: int,
        element: int,
        padded: int,
        vectors: int,
        x: Any,
        x_at: int,
        x_stride: int,
        width: int,
        rows: int,
        h: Any,
        h_at: int,
        h_stride: int,
        scale: Any,
    ) -> None:
        """``h[row, j] = scale * dot(x[row], A[j])`` for ``vectors`` vectors from ``element``."""
        place = element // per_slice
        within = element - place * per_slice
        place += list_at
        scales = simd.splat(scale)
        shared = rows // 4 * 4
        for j in range(0, vectors, 4):
            p0, w0 = place, within
            p1, w1 = moved(p0, w0, padded, per_slice)
            p2, w2 = moved(p1, w1, padded, per_slice)
            p3, w3 = moved(p2, w2, padded, per_slice)
            left = min(4, vectors - j)
            if left < 4:  # beyond the last, it is taken again
                p3, w3 = place, within
            if left < 3:
                p2, w2 = place, within
            if left < 2:
                p1, w1 = place, within
            for row in range(0, shared, 4):
                at = x_at + row * x_stride
                s = four_rows(w, per_slice, slices, p0, w0, x, at, x_stride, width)
                t = four_rows(w, per_slice, slices, p1, w1, x, at, x_stride, width)
                u = four_rows(w, per_slice, slices, p2, w2, x, at, x_stride, width)
                v = four_rows(w, per_slice, slices, p3, w3, x, at, x_stride, width)
                low = simd.folded((s[0], t[0], u[0], v[0], s[1], t[1], u[1], v[1]))
                high = simd.folded((s[2], t[2], u[2], v[2], s[3], t[3], u[3], v[3]))
                dots = simd.mul(scales, simd.joined(low, high))
                to = h_at + row * h_stride + j
                for i in range(4):
                    # Row i's four lie in lanes 4i to 4i + 3.
                    simd.store_between(h, to + i * (h_stride - 4), dots, 4 * i, 4 * i + left)
            for i in range(left):
                for row in range(shared, rows):
                    at, to = x_at + row * x_stride, h_at + row * h_stride + j + i
                    h[to] = scale * one_row(w, per_slice, slices, place, within, x, at, width)
                place, within = moved(place, within, padded, per_slice)

    return shrink
