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
from loramux_kernels.attention import queries
from loramux_kernels.attention.moves import Moves
from loramux_kernels.attention.pages import ROW_BLOCK, Pages
from loramux_kernels.jit import inlined, inner, parallel

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
        pages.path_start,
        pages.path_nodes,
        pages.page_tokens,
        pages.num_kv_heads,
        pages.head_dim,
        num_heads,
        scale,
        window,
        numba.get_num_threads(),
    )


def compact(arena: torch.Tensor, pages: Pages, moves: Moves) -> None:
    """See :func:`loramux_kernels.attention.compact`."""
    dispatch.calls["cpu:compact"] += 1
    _require_fp32(pages)
    compact_tokens(
        arena.numpy(),
        moves.source,
        moves.target,
        moves.start,
        pages.page_tokens,
        pages.num_kv_heads,
        pages.head_dim,
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
def _find_keys(
    keys: Any,
    values: Any,
    pool: Any,
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
    path: Any,
    path_at: int,
    held: int,
) -> None:
    """Where the keys and values of tokens ``base`` onwards lie, and ask for them. Lanes before
    ``start`` and from ``count`` on point at a key that is there; nobody uses what they give. Tokens
    from ``held`` on are the nodes ``path[path_at:]``."""
    first = max(0, start - base)
    i = first
    while i < count:
        place, run = base + i, count - i
        if place >= held:
            place, run = held + path[path_at + place - held], 1
        else:
            run = min(run, held - place)
        page = place // page_tokens
        within = place - page * page_tokens
        key = offsets[layer, request, page] // 4 + (kv_head * page_tokens + within) * dim
        value = key + kv_heads * page_tokens * dim
        here = min(run, page_tokens - within)
        for j in range(here):
            keys[i + j] = key + j * dim
            values[i + j] = value + j * dim
        for d in range(0, here * dim, 16):
            simd.prefetch(pool, key + d)
            simd.prefetch(pool, value + d)
        i += here
    for i in range(KEY_BLOCK):
        if i < first or i >= count:
            keys[i] = keys[first]


@inlined
def _span(token: int, base: int, window: int) -> Any:
    """Which keys of the block at ``base`` the query of ``token`` sees."""
    first = max(0, token + 1 - window - base) if window > 0 else 0
    return first, min(KEY_BLOCK, token + 1 - base)


@inlined
def _weigh(s: Any, first: int, last: int, state: int, top: Any, mass: Any, to: Any, at: int) -> Any:
    """One block more of a query's softmax (Milakov and Gimelshein's online softmax): its weights,
    and the factor for what has been added up."""
    s = simd.between(s, first, last)
    above = max(top[state], simd.largest(s))
    s = simd.exp(simd.add(s, simd.splat(-above)))
    simd.store(to, at, s)
    # Most blocks leave the maximum where it was, and exp(0) is 1.
    same = above == top[state]
    keep = np.float32(1) if same else np.exp(top[state] - above)
    top[state] = above
    mass[state] = mass[state] * keep + simd.total(s)
    return keep


@inlined
def _attend_block(
    n: int,
    count: int,
    base: int,
    q: Any,
    places: Any,
    tokens: Any,
    window: int,
    scales: Any,
    pool: Any,
    keys: Any,
    values: Any,
    state: Any,
    dim: int,
) -> None:
    """Query ``n``, or it and the next two, over a block of keys."""
    acc, top, mass, weights = state
    first, last = _span(tokens[n], base, window)
    if count == 1:
        if first < last:
            s = simd.mul(scales, queries.score_one(q, places[n], pool, keys, dim))
            keep = _weigh(s, first, last, n, top, mass, weights, 0)
            queries.add_one(acc, n * dim, keep, weights, first, last, pool, values, dim)
        return
    s, t, u = queries.score_three(q, places[n], places[n + 1], places[n + 2], pool, keys, dim)
    s, t, u = simd.mul(scales, s), simd.mul(scales, t), simd.mul(scales, u)
    if tokens[n] == tokens[n + 2]:
        if first < last:
            a = _weigh(s, first, last, n, top, mass, weights, 0)
            b = _weigh(t, first, last, n + 1, top, mass, weights, 16)
            c = _weigh(u, first, last, n + 2, top, mass, weights, 32)
            keeps = (a, b, c)
            queries.add_three(acc, n * dim, keeps, weights, first, last, pool, values, dim)
        return
    for i in range(3):
        first, last = _span(tokens[n + i], base, window)
        if first < last:
            keep = _weigh(s, first, last, n + i, top, mass, weights, 0)
            queries.add_one(acc, (n + i) * dim, keep, weights, first, last, pool, values, dim)
        s, t = t, u


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
    path_start: Any,
    path_nodes: Any,
    page_tokens: int,
    kv_heads: int,
    dim: int,
    heads: int,
    parts: int,
    scale: float,
    window: int,
    state: Any,
    lists: Any,
) -> None:
    """Every ``threads``-th item: a block of a request's rows, and a KV head's query heads or,
    with ``parts`` > 1, a share of them."""
    blocks = len(block_row)
    group = heads // kv_heads
    part = group // parts
    scales = simd.splat(np.float32(scale))
    acc, top, mass, _ = state
    places, tokens, keys, next_keys, values, next_values = lists
    for item in range(thread, blocks * kv_heads * parts, threads):
        block = item // (kv_heads * parts)
        kv_head = item // parts % kv_heads
        first_head = kv_head * group + item % parts * part
        request = block_request[block]
        row = block_row[block]
        rows = min(ROW_BLOCK, row_start[request + 1] - row)
        # The token that the block's first row is, in its request.
        token = context[request] - (row_start[request + 1] - row)
        # No token of a chain is found along a path.
        path_at, held = 0, context[request]
        if len(path_nodes) > 0 and path_start[row] < path_start[row + 1]:
            rows = 1
            path_at = path_start[row]
            held = context[request] - (row_start[request + 1] - row_start[request])
            token = held + path_start[row + 1] - path_at - 1
        num = rows * part
        for n in range(num):
            places[n] = (row + n // part) * columns + (first_head + n % part) * dim
            tokens[n] = token + n // part
        places[num], tokens[num] = places[num - 1], tokens[num - 1]
        acc[: (num + 1) * dim] = 0
        top[: num + 1] = -np.inf
        mass[: num + 1] = 0
        start = max(0, token + 1 - window) if window > 0 else 0
        begin, end = start // KEY_BLOCK * KEY_BLOCK, token + rows
        where = (page_tokens, kv_head, kv_heads, dim, path_nodes, path_at, held)
        some = min(KEY_BLOCK, end - begin)
        _find_keys(
            next_keys, next_values, pool, offsets, layer, request, begin, start, some, *where
        )
        for base in range(begin, end, KEY_BLOCK):
            keys, next_keys = next_keys, keys
            values, next_values = next_values, values
            some = min(KEY_BLOCK, end - base - KEY_BLOCK)
            if some > 0:
                _find_keys(
                    next_keys,
                    next_values,
                    pool,
                    offsets,
                    layer,
                    request,
                    base + KEY_BLOCK,
                    start,
                    some,
                    *where,
                )
            n = 0
            while n < num:
                count = 1 if n + 1 == num or dim % 16 else 3
                _attend_block(
                    n,
                    count,
                    base,
                    qkv,
                    places,
                    tokens,
                    window,
                    scales,
                    pool,
                    keys,
                    values,
                    state,
                    dim,
                )
                n += count
        for n in range(num):
            to = (row + n // part) * heads * dim + (first_head + n % part) * dim
            shares = simd.splat(mass[n])
            for d in range(0, dim, 16):
                left = min(16, dim - d)
                share = simd.div(simd.load_part(acc, n * dim + d, left), shares)
                simd.store_part(out, to + d, share, left)


@parallel(
    "void(float32[:,::1], float32[:,::1], uint8[::1], int64[:,:,::1], int64, int32[::1],"
    " int32[::1], int32[::1], int32[::1], int32[::1], int32[::1],"
    " int64, int64, int64, int64, float64, int64, int64)"
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
    path_start: Any,
    path_nodes: Any,
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
    # Queries of an item, and one more: a third beside two.
    most = ROW_BLOCK * heads // kv_heads // parts + 1
    for thread in prange(threads):
        acc = np.empty(most * dim, dtype=np.float32)
        top = np.empty(most, dtype=np.float32)
        mass = np.empty(most, dtype=np.float32)
        weights = np.empty(3 * KEY_BLOCK, dtype=np.float32)
        # Where each query begins, row by row, and which token it is.
        places = np.empty(most, dtype=np.int64)
        tokens = np.empty(most, dtype=np.int64)
        keys, next_keys = np.empty(KEY_BLOCK, np.int64), np.empty(KEY_BLOCK, np.int64)
        values, next_values = np.empty(KEY_BLOCK, np.int64), np.empty(KEY_BLOCK, np.int64)
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
            path_start,
            path_nodes,
            page_tokens,
            kv_heads,
            dim,
            heads,
            parts,
            scale,
            window,
            (acc, top, mass, weights),
            (places, tokens, keys, next_keys, values, next_values),
        )


@parallel("void(uint8[::1], int64[:,::1], int64[:,::1], int32[::1], int64, int64, int64)")
def compact_tokens(
    arena: Any, source: Any, target: Any, start: Any, page_tokens: int, kv_heads: int, dim: int
) -> None:
    pool = arena.view(np.float32)
    requests = len(start) - 1
    for item in prange(len(source) * requests):
        layer, request = item // requests, item % requests
        for move in range(start[request], start[request + 1]):
            for head in range(2 * kv_heads):
                ahead = head * page_tokens * dim
                from_, to = source[layer, move] // 4 + ahead, target[layer, move] // 4 + ahead
                for d in range(dim):
                    pool[to + d] = pool[from_ + d]
