"""``h = A x`` on the CPU: one dot product per row and vector of A, weights widened in registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from loramux_kernels import simd
from loramux_kernels.jit import inner


def shrink_with(load: Any) -> Any:
    """The work of one item, for weights that ``load`` widens."""

    # Vectors are read one after the other, so that the hardware sees one stream to prefetch; four
    # accumulators over neighbouring lanes keep the multipliers busy meanwhile.
    @inner
    def four(w: Any, at: int) -> Any:
        return load(w, at), load(w, at + 16), load(w, at + 32), load(w, at + 48)

    @inner
    def dot(s: Any, x: Any, at: int, a: Any) -> Any:
        return (
            simd.fma(simd.load(x, at), a[0], s[0]),
            simd.fma(simd.load(x, at + 16), a[1], s[1]),
            simd.fma(simd.load(x, at + 32), a[2], s[2]),
            simd.fma(simd.load(x, at + 48), a[3], s[3]),
        )

    @inner
    def rest(s: Any, x: Any, at: int, w: Any, a: int, length: int) -> Any:
        first = s[0]
        for k in range(0, length, 16):
            part = simd.load_part(x, at + k, min(16, length - k))
            first = simd.fma(part, load(w, a + k), first)
        return first, s[1], s[2], s[3]

    @inner
    def folded(s: Any) -> Any:
        return simd.total(simd.add(simd.add(s[0], s[1]), simd.add(s[2], s[3])))

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
        width: int,
        rows: int,
        h: Any,
        h_at: int,
        h_stride: int,
        scale: Any,
    ) -> None:
        """``h[row, j] = scale * dot(x[row], A[j])`` for ``vectors`` vectors from ``element``."""
        itemsize = w.itemsize
        zero = simd.splat(np.float32(0))
        zeros = (zero, zero, zero, zero)
        place = element // per_slice
        within = element - place * per_slice
        place += list_at
        for j in range(vectors):
            row = 0
            while row + 4 <= rows:
                # Four rows share each widened weight; each one's order is that of a lone row.
                x0 = x_at + row * width
                x1, x2, x3 = x0 + width, x0 + 2 * width, x0 + 3 * width
                s0, s1, s2, s3 = zeros, zeros, zeros, zeros
                done, here, start = 0, place, within
                while done < width:
                    length = min(width - done, per_slice - start)
                    a = slices[here] // itemsize + start
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
                    done, here, start = done + length, here + 1, 0
                to = h_at + row * h_stride + j
                h[to] = scale * folded(s0)
                h[to + h_stride] = scale * folded(s1)
                h[to + 2 * h_stride] = scale * folded(s2)
                h[to + 3 * h_stride] = scale * folded(s3)
                row += 4
            while row < rows:
                x0 = x_at + row * width
                s0 = zeros
                done, here, start = 0, place, within
                while done < width:
                    length = min(width - done, per_slice - start)
                    a = slices[here] // itemsize + start
                    whole = length // 64 * 64
                    for k in range(0, whole, 64):
                        s0 = dot(s0, x, x0 + done + k, four(w, a + k))
                    if whole < length:
                        s0 = rest(s0, x, x0 + done + whole, w, a + whole, length - whole)
                    done, here, start = done + length, here + 1, 0
                h[h_at + row * h_stride + j] = scale * folded(s0)
                row += 1
            within += padded
            while within >= per_slice:
                within -= per_slice
                place += 1

    return shrink
