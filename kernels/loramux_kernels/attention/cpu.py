"""RoPE, the KV store and paged attention on the CPU, for fp32 pools.

Attention walks a row's context in blocks of sixteen keys that start at multiples of sixteen, so
neither the page size nor the rows beside it show in a row's bits. A work item is a few rows of
one request times one KV head and its query heads: they read each key from memory once.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import prange

from loramux_kernels import dispatch, simd
from loramux_kernels.attention.pages import ROW_BLOCK, Pages
from loramux_kernels.jit import inner, parallel

KEY_BLOCK = 16


def rope_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    arena: torch.Tensor,
    pages: Pages,
    layer: int,
    num_heads: int,
) -> None:
    """See :func:`loramux_kernels.attention.rope_store`."""
    dispatch.calls["cpu:rope_store"] += 1
    _require_fp32(pages)
    rope_store_rows(
        qkv.numpy(),
        cos.numpy(),
        sin.numpy(),
        positions.numpy(),
        arena.numpy(),
        pages.offsets,
        layer,
        pages.request_of_row,
        pages.row_start,
        pages.context,
        pages.page_tokens,
        pages.num_kv_heads,
        pages.head_dim,
        num_heads,
    )


def paged_attention(
    out: torch.Tensor,
    qkv: torch.Tensor,
    arena: torch.Tensor,
    pages: Pages,
    layer: int,
    num_heads: int,
    scale: float,
    window: int,
) -> None:
    """See :func:`loramux_kernels.attention.paged_attention`."""
    dispatch.calls["cpu:paged_attention"] += 1
    _require_fp32(pages)
    paged_attention_rows(
        out.numpy(),
        qkv.numpy(),
        arena.numpy(),
        pages.offsets,
        layer,
        pages.block_request,
        pages.block_row,
        pages.row_start,
        pages.context,
        pages.page_tokens,
        pages.num_kv_heads,
        pages.head_dim,
        num_heads,
        scale,
        window,
        numba.get_num_threads(),
    )


def _require_fp32(pages: Pages) -> None:
    if pages.dtype != torch.float32:
        raise ValueError(f"on the CPU the KV dtype must be float32, got {pages.dtype}")


@inner
def _turn(qkv: Any, at: int, cos: Any, sin: Any, angle: int, half: int) -> None:
    for d in range(0, half, 16):
        left = min(16, half - d)
        c = simd.load_part(cos, angle + d, left)
        s = simd.load_part(sin, angle + d, left)
        first = simd.load_part(qkv, at + d, left)
        second = simd.load_part(qkv, at + half + d, left)
        minus = simd.mul(second, simd.splat(np.float32(-1)))
        simd.store_part(qkv, at + d, simd.fma(first, c, simd.mul(minus, s)), left)
        simd.store_part(qkv, at + half + d, simd.fma(second, c, simd.mul(first, s)), left)


@parallel(
    "void(float32[:,::1], float32[:,::1], float32[:,::1], int64[::1], uint8[::1],"
    " int64[:,:,::1], int64, int32[::1], int32[::1], int32[::1], int64, int64, int64, int64)"
)
def rope_store_rows(
    qkv: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    arena: Any,
    offsets: Any,
    layer: int,
    request_of_row: Any,
    row_start: Any,
    context: Any,
    page_tokens: int,
    kv_heads: int,
    dim: int,
    heads: int,
) -> None:
    pool = arena.view(np.float32)
    columns = qkv.shape[1]
    qkv, cos, sin = qkv.reshape(-1), cos.reshape(-1), sin.reshape(-1)
    half = dim // 2
    for row in prange(len(request_of_row)):
        request = request_of_row[row]
        token = context[request] - (row_start[request + 1] - row)
        base = offsets[layer, request, token // page_tokens] // 4
        for head in range(heads + kv_heads):
            _turn(qkv, row * columns + head * dim, cos, sin, positions[row] * half, half)
        # k heads, then v heads: the order of qkv's columns and of a slice alike.
        source = row * columns + heads * dim
        target = base + token % page_tokens * dim
        for head in range(2 * kv_heads):
            to = target + head * page_tokens * dim
            for d in range(0, dim, 16):
                left = min(16, dim - d)
                simd.store_part(
                    pool, to + d, simd.load_part(qkv, source + head * dim + d, left), left
                )


@inner
def _scores(q: Any, at: int, pool: Any, keys: Any, dim: int) -> Any:
    """The dot product of one query with each of sixteen keys, key i's in lane i."""
    zero = simd.splat(np.float32(0))
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    s8, s9, s10, s11, s12, s13, s14, s15 = zero, zero, zero, zero, zero, zero, zero, zero
    for d in range(0, dim, 16):
        left = min(16, dim - d)
        x = simd.load_part(q, at + d, left)
        s0 = simd.fma(x, simd.load_part(pool, keys[0] + d, left), s0)
        s1 = simd.fma(x, simd.load_part(pool, keys[1] + d, left), s1)
        s2 = simd.fma(x, simd.load_part(pool, keys[2] + d, left), s2)
        s3 = simd.fma(x, simd.load_part(pool, keys[3] + d, left), s3)
        s4 = simd.fma(x, simd.load_part(pool, keys[4] + d, left), s4)
        s5 = simd.fma(x, simd.load_part(pool, keys[5] + d, left), s5)
        s6 = simd.fma(x, simd.load_part(pool, keys[6] + d, left), s6)
        s7 = simd.fma(x, simd.load_part(pool, keys[7] + d, left), s7)
        s8 = simd.fma(x, simd.load_part(pool, keys[8] + d, left), s8)
        s9 = simd.fma(x, simd.load_part(pool, keys[9] + d, left), s9)
        s10 = simd.fma(x, simd.load_part(pool, keys[10] + d, left), s10)
        s11 = simd.fma(x, simd.load_part(pool, keys[11] + d, left), s11)
        s12 = simd.fma(x, simd.load_part(pool, keys[12] + d, left), s12)
        s13 = simd.fma(x, simd.load_part(pool, keys[13] + d, left), s13)
        s14 = simd.fma(x, simd.load_part(pool, keys[14] + d, left), s14)
        s15 = simd.fma(x, simd.load_part(pool, keys[15] + d, left), s15)
    return simd.totals((s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15))


@inner
def _scaled_sum(
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


@inner
def _find_keys(
    keys: Any,
    values: Any,
    offsets: Any,
    layer: int,
    request: int,
    base: int,
    start: int,
    count: int,
    page_tokens: int,
    kv_head: int,
    kv_heads: int,
    dim: int,
) -> None:
    """Where the keys and values of tokens ``base`` onwards lie. Lanes before ``start`` and from
    ``count`` on point at a key that is there; nobody uses what they give."""
    page = base // page_tokens
    within = base - page * page_tokens
    for i in range(count):
        if base + i >= start:
            place = kv_head * page_tokens + within
            keys[i] = offsets[layer, request, page] // 4 + place * dim
            values[i] = keys[i] + kv_heads * page_tokens * dim
        within += 1
        if within == page_tokens:
            page, within = page + 1, 0
    first = max(0, start - base)
    for i in range(KEY_BLOCK):
        if i < first or i >= count:
            keys[i] = keys[first]


@inner
def _attend_items(
    thread: int,
    threads: int,
    out: Any,
    qkv: Any,
    columns: int,
    pool: Any,
    offsets: Any,
    layer: int,
    block_request: Any,
    block_row: Any,
    row_start: Any,
    context: Any,
    page_tokens: int,
    kv_heads: int,
    dim: int,
    heads: int,
    parts: int,
    scale: float,
    window: int,
) -> None:
    """Every ``threads``-th item: a block of a request's rows, and a KV head's query heads or,
    with ``parts`` > 1, a share of them."""
    blocks = len(block_row)
    group = heads // kv_heads
    part = group // parts
    scales = simd.splat(np.float32(scale))
    acc = np.empty(ROW_BLOCK * part * dim, dtype=np.float32)
    top = np.empty(ROW_BLOCK * part, dtype=np.float32)
    mass = np.empty(ROW_BLOCK * part, dtype=np.float32)
    keys = np.empty(KEY_BLOCK, dtype=np.int64)
    values = np.empty(KEY_BLOCK, dtype=np.int64)
    weights = np.empty(KEY_BLOCK, dtype=np.float32)
    for item in range(thread, blocks * kv_heads * parts, threads):
        block = item // (kv_heads * parts)
        kv_head = item // parts % kv_heads
        first_head = kv_head * group + item % parts * part
        request = block_request[block]
        row = block_row[block]
        rows = min(ROW_BLOCK, row_start[request + 1] - row)
        # The token that the block's first row is, in its request.
        token = context[request] - (row_start[request + 1] - row)
        acc[:] = 0
        top[:] = -np.inf
        mass[:] = 0
        start = max(0, token + 1 - window) if window > 0 else 0
        for base in range(start // KEY_BLOCK * KEY_BLOCK, token + rows, KEY_BLOCK):
            count = min(KEY_BLOCK, token + rows - base)
            _find_keys(
                keys,
                values,
                offsets,
                layer,
                request,
                base,
                start,
                count,
                page_tokens,
                kv_head,
                kv_heads,
                dim,
            )
            for r in range(rows):
                last = min(KEY_BLOCK, token + r + 1 - base)
                first = max(0, token + r + 1 - window - base) if window > 0 else 0
                if first >= last:
                    continue
                for g in range(part):
                    q = (row + r) * columns + (first_head + g) * dim
                    s = simd.mul(scales, _scores(qkv, q, pool, keys, dim))
                    s = simd.between(s, first, last)
                    state = r * part + g
                    above = max(top[state], simd.largest(s))
                    s = simd.exp(simd.add(s, simd.splat(-above)))
                    simd.store(weights, 0, s)
                    # Most blocks leave the maximum where it was, and exp(0) is 1.
                    same = above == top[state]
                    keep = np.float32(1) if same else np.exp(top[state] - above)
                    top[state] = above
                    mass[state] = mass[state] * keep + simd.total(s)
                    _scaled_sum(acc, state * dim, keep, weights, first, last, pool, values, dim)
        for r in range(rows):
            for g in range(part):
                state = r * part + g
                to = (row + r) * heads * dim + (first_head + g) * dim
                for d in range(dim):
                    out[to + d] = acc[state * dim + d] / mass[state]


@parallel(
    "void(float32[:,::1], float32[:,::1], uint8[::1], int64[:,:,::1], int64, int32[::1],"
    " int32[::1], int32[::1], int32[::1], int64, int64, int64, int64, float64, int64, int64)"
)
def paged_attention_rows(
    out: Any,
    qkv: Any,
    arena: Any,
    offsets: Any,
    layer: int,
    block_request: Any,
    block_row: Any,
    row_start: Any,
    context: Any,
    page_tokens: int,
    kv_heads: int,
    dim: int,
    heads: int,
    scale: float,
    window: int,
    threads: int,
) -> None:
    pool = arena.view(np.float32)
    columns = qkv.shape[1]
    out, qkv = out.reshape(-1), qkv.reshape(-1)
    # One lone long row must still occupy every thread: then each query head is its own item.
    parts = heads // kv_heads if len(block_row) * kv_heads < 4 * threads else 1
    for thread in prange(threads):
        _attend_items(
            thread,
            threads,
            out,
            qkv,
            columns,
            pool,
            offsets,
            layer,
            block_request,
            block_row,
            row_start,
            context,
            page_tokens,
            kv_heads,
            dim,
            heads,
            parts,
            scale,
            window,
        )
