"""Queries over a block of sixteen keys and values on the CPU: three at a time, or one.

Three share what they load: keys and values come from memory once, and into registers once. The
sums are those of a lone query, to the bit: in a dot product lane l adds up dimensions l, l + 16,
..., then lanes are folded, eight apart, four, two, one; values are added in the order of keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loramux_kernels import simd
from loramux_kernels.jit import inlined


@inlined
def _eight(pool: Any, keys: Any, first: int, d: int) -> Any:
    return (
        simd.load(pool, keys[first] + d),
        simd.load(pool, keys[first + 1] + d),
        simd.load(pool, keys[first + 2] + d),
        simd.load(pool, keys[first + 3] + d),
        simd.load(pool, keys[first + 4] + d),
        simd.load(pool, keys[first + 5] + d),
        simd.load(pool, keys[first + 6] + d),
        simd.load(pool, keys[first + 7] + d),
    )


@inlined
def _eight_parts(pool: Any, keys: Any, first: int, d: int, left: int) -> Any:
    return (
        simd.load_part(pool, keys[first] + d, left),
        simd.load_part(pool, keys[first + 1] + d, left),
        simd.load_part(pool, keys[first + 2] + d, left),
        simd.load_part(pool, keys[first + 3] + d, left),
        simd.load_part(pool, keys[first + 4] + d, left),
        simd.load_part(pool, keys[first + 5] + d, left),
        simd.load_part(pool, keys[first + 6] + d, left),
        simd.load_part(pool, keys[first + 7] + d, left),
    )


@inlined
def _multiply(s: Any, x: Any, k: Any) -> Any:
    return (
        simd.fma(x, k[0], s[0]),
        simd.fma(x, k[1], s[1]),
        simd.fma(x, k[2], s[2]),
        simd.fma(x, k[3], s[3]),
        simd.fma(x, k[4], s[4]),
        simd.fma(x, k[5], s[5]),
        simd.fma(x, k[6], s[6]),
        simd.fma(x, k[7], s[7]),
    )


@inlined
def _zeros() -> Any:
    zero = simd.splat(np.float32(0))
    return zero, zero, zero, zero, zero, zero, zero, zero


@inlined
def _score_with_eight(q: Any, a: int, pool: Any, keys: Any, first: int, dim: int) -> Any:
    s = _zeros()
    whole = dim // 16 * 16
    for d in range(0, whole, 16):
        s = _multiply(s, simd.load(q, a + d), _eight(pool, keys, first, d))
    if whole < dim:
        left = dim - whole
        k = _eight_parts(pool, keys, first, whole, left)
        s = _multiply(s, simd.load_part(q, a + whole, left), k)
    return simd.folded(s)


@inlined
def score_one(q: Any, a: int, pool: Any, keys: Any, dim: int) -> Any:
    """The dot product of the query at ``q[a:]`` with each of sixteen keys, key i's in lane i."""
    low = _score_with_eight(q, a, pool, keys, 0, dim)
    return simd.joined(low, _score_with_eight(q, a, pool, keys, 8, dim))


@inlined
def _score_three_with_eight(
    q: Any, a: int, b: int, c: int, pool: Any, keys: Any, first: int, dim: int
) -> Any:
    s, t, u = _zeros(), _zeros(), _zeros()
    for d in range(0, dim, 16):
        k = _eight(pool, keys, first, d)
        s = _multiply(s, simd.load(q, a + d), k)
        t = _multiply(t, simd.load(q, b + d), k)
        u = _multiply(u, simd.load(q, c + d), k)
    return simd.folded(s), simd.folded(t), simd.folded(u)


@inlined
def score_three(q: Any, a: int, b: int, c: int, pool: Any, keys: Any, dim: int) -> Any:
    """:func:`score_one` of the queries at ``q[a:]``, ``q[b:]`` and ``q[c:]``; ``dim`` is a multiple
    of 16."""
    s, t, u = _score_three_with_eight(q, a, b, c, pool, keys, 0, dim)
    v, w, x = _score_three_with_eight(q, a, b, c, pool, keys, 8, dim)
    return simd.joined(s, v), simd.joined(t, w), simd.joined(u, x)


@inlined
def add_one(
    acc: Any,
    at: int,
    keep: Any,
    weights: Any,
    first: int,
    last: int,
    pool: Any,
    values: Any,
    dim: int,
) -> None:
    """``acc = keep * acc + sum_i weights[i] * values[i]``, i in order.

    Four neighbouring vectors at a time: a chain alone would wait for each multiply-add.
    """
    factor = simd.splat(keep)
    whole = dim // 64 * 64
    for d in range(0, whole, 64):
        a = simd.mul(factor, simd.load(acc, at + d))
        b = simd.mul(factor, simd.load(acc, at + d + 16))
        c = simd.mul(factor, simd.load(acc, at + d + 32))
        e = simd.mul(factor, simd.load(acc, at + d + 48))
        for i in range(first, last):
            weight = simd.broadcast(weights, i)
            value = values[i] + d
            a = simd.fma(weight, simd.load(pool, value), a)
            b = simd.fma(weight, simd.load(pool, value + 16), b)
            c = simd.fma(weight, simd.load(pool, value + 32), c)
            e = simd.fma(weight, simd.load(pool, value + 48), e)
        simd.store(acc, at + d, a)
        simd.store(acc, at + d + 16, b)
        simd.store(acc, at + d + 32, c)
        simd.store(acc, at + d + 48, e)
    for d in range(whole, dim, 16):
        left = min(16, dim - d)
        s = simd.mul(factor, simd.load_part(acc, at + d, left))
        for i in range(first, last):
            v = simd.load_part(pool, values[i] + d, left)
            s = simd.fma(simd.broadcast(weights, i), v, s)
        simd.store_part(acc, at + d, s, left)


@inlined
def add_three(
    acc: Any,
    at: int,
    keeps: Any,
    weights: Any,
    first: int,
    last: int,
    pool: Any,
    values: Any,
    dim: int,
) -> None:
    """:func:`add_one` of three neighbours in ``acc``, whose weights lie sixteen apart: a third of
    the chains' waiting, a third of the values' loads."""
    other, third = at + dim, at + 2 * dim
    f, g, h = simd.splat(keeps[0]), simd.splat(keeps[1]), simd.splat(keeps[2])
    whole = dim // 32 * 32
    for d in range(0, whole, 32):
        a = simd.mul(f, simd.load(acc, at + d))
        b = simd.mul(f, simd.load(acc, at + d + 16))
        m = simd.mul(g, simd.load(acc, other + d))
        n = simd.mul(g, simd.load(acc, other + d + 16))
        s = simd.mul(h, simd.load(acc, third + d))
        t = simd.mul(h, simd.load(acc, third + d + 16))
        for i in range(first, last):
            u = simd.load(pool, values[i] + d)
            v = simd.load(pool, values[i] + d + 16)
            weight = simd.broadcast(weights, i)
            a, b = simd.fma(weight, u, a), simd.fma(weight, v, b)
            weight = simd.broadcast(weights, 16 + i)
            m, n = simd.fma(weight, u, m), simd.fma(weight, v, n)
            weight = simd.broadcast(weights, 32 + i)
            s, t = simd.fma(weight, u, s), simd.fma(weight, v, t)
        simd.store(acc, at + d, a)
        simd.store(acc, at + d + 16, b)
        simd.store(acc, other + d, m)
        simd.store(acc, other + d + 16, n)
        simd.store(acc, third + d, s)
        simd.store(acc, third + d + 16, t)
    for d in range(whole, dim, 16):
        left = min(16, dim - d)
        a = simd.mul(f, simd.load_part(acc, at + d, left))
        m = simd.mul(g, simd.load_part(acc, other + d, left))
        s = simd.mul(h, simd.load_part(acc, third + d, left))
        for i in range(first, last):
            v = simd.load_part(pool, values[i] + d, left)
            a = simd.fma(simd.broadcast(weights, i), v, a)
            m = simd.fma(simd.broadcast(weights, 16 + i), v, m)
            s = simd.fma(simd.broadcast(weights, 32 + i), v, s)
        simd.store_part(acc, at + d, a, left)
        simd.store_part(acc, other + d, m, left)
        simd.store_part(acc, third + d, s, left)
