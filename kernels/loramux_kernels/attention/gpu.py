"""RoPE, the KV store and paged attention in Triton.

Attention splits every context at multiples of SPLIT keys and walks a split in blocks of keys, so
a row meets its keys in one order whatever else is in the batch. Each split of a longer context is
an item of its own (Flash-Decoding) and a second kernel folds the parts in order; a row with one
part gets the same bits as without folding. The grids are fixed and the lists of items lie on the
device (``Pages.arrays``), so that a CUDA graph replays with any contexts.
"""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch
from loramux_kernels.attention import pages as layout
from loramux_kernels.attention.moves import Moves
from loramux_kernels.attention.pages import ROW_BLOCK, Pages
from loramux_kernels.mirror import mirror, scratch
from loramux_kernels.tuning import num_programs, table_of


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
    dispatch.calls["gpu:rope_store"] += 1
    if not pages.num_rows:
        return
    step, _ = pages.on_device(qkv.device)
    half = pages.head_dim // 2
    launch = table_of(qkv.device).launch("rope_store")
    rope_store_kernel[(pages.num_rows, num_heads + 2 * pages.num_kv_heads)](
        qkv,
        cos,
        sin,
        positions,
        arena.view(pages.dtype),
        step["pages"],
        step["page_start"],
        step["layer_start"],
        step["request_of_row"],
        step["row_start"],
        step["context"],
        step["attention_counts"],
        layer,
        pages.pages_per_layer,
        HEADS=num_heads,
        KV_HEADS=pages.num_kv_heads,
        PAGE_TOKENS=pages.page_tokens,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        **launch.options,
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
    if not pages.num_rows:
        return
    step, num_parts = pages.on_device(qkv.device)
    group = num_heads // pages.num_kv_heads
    rows = 1 if pages.alone else ROW_BLOCK
    elements = layout.parts_elements(num_parts, rows, num_heads, pages.head_dim)
    parts = scratch("attention_parts", qkv.device, elements)
    tuned = table_of(qkv.device)
    # What weighs on registers is how many queries share a block, so that is this kernel's width.
    block_m = max(16, triton.next_power_of_2(rows * group))
    launch = tuned.launch("attention", block_m)
    dispatch.calls["gpu:paged_attention"] += 1
    attention_kernel[(num_programs(launch, qkv.device),)](
        out,
        parts,
        qkv,
        arena.view(pages.dtype),
        step["pages"],
        step["page_start"],
        step["layer_start"],
        step["attention_items"],
        step["row_start"],
        step["context"],
        step["path_start"],
        step["path_nodes"],
        step["attention_counts"],
        layer,
        pages.pages_per_layer,
        scale,
        window,
        HEADS=num_heads,
        KV_HEADS=pages.num_kv_heads,
        PAGE_TOKENS=pages.page_tokens,
        DIM=pages.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(pages.head_dim)),
        ROWS=rows,
        GROUP=group,
        BLOCK_M=block_m,
        KEYS=launch.block,
        SPLIT=layout.SPLIT,
        TREES=pages.paths is not None,
        PRECISION="tf32" if qkv.dtype != torch.float32 else "tf32x3",
        **launch.options,
    )
    if not num_parts:
        return
    dispatch.calls["gpu:fold_attention"] += 1
    launch = tuned.launch("fold_attention", pages.head_dim)
    fold_kernel[(num_programs(launch, qkv.device),)](
        out,
        parts,
        step["request_of_row"],
        step["fold_rows"],
        step["row_start"],
        step["context"],
        step["path_start"],
        step["attention_counts"],
        window,
        HEADS=num_heads,
        DIM=pages.head_dim,
        BLOCK_D=triton.next_power_of_2(pages.head_dim),
        ROWS=rows,
        SPLIT=layout.SPLIT,
        TREES=pages.paths is not None,
        **launch.options,
    )


def compact(arena: torch.Tensor, pages: Pages, moves: Moves) -> None:
    """See :func:`loramux_kernels.attention.compact`."""
    dispatch.calls["gpu:compact"] += 1
    layers, num_moves = moves.source.shape
    layer_start = pages.layer_start
    if layer_start is None:
        layer_start, per_layer = np.zeros(layers, np.int64), num_moves
    else:
        layers, per_layer = len(layer_start), 0
    arrays: dict[str, npt.NDArray[Any]] = {
        "source": moves.source,
        "target": moves.target,
        "start": moves.start,
        "layer_start": layer_start,
    }
    there = mirror(arrays, arena.device)
    launch = table_of(arena.device).launch("rope_store")
    compact_kernel[(layers, len(moves.start) - 1, 2 * pages.num_kv_heads)](
        arena.view(pages.dtype),
        there["source"],
        there["target"],
        there["start"],
        there["layer_start"],
        per_layer,
        PLANE=pages.page_tokens * pages.head_dim,
        DIM=pages.head_dim,
        BLOCK=triton.next_power_of_2(pages.head_dim),
        **launch.options,
    )


@triton.jit(do_not_specialize=["layer", "pages_per_layer"])
def rope_store_kernel(
    qkv,
    cos,
    sin,
    positions,
    pool,
    pages,
    page_start,
    layer_start,
    request_of_row,
    row_start,
    context,
    counts,
    layer,
    pages_per_layer,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (row, head of q, k or v); rows past the count are a graph's padding."""
    row, head = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(counts):
        return
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    at = qkv + (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + lanes
    first = tl.load(at, mask=inside, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        angle = tl.load(positions + row) * HALF + lanes
        c = tl.load(cos + angle, mask=inside, other=0)
        s = tl.load(sin + angle, mask=inside, other=0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
        tl.store(at, first.to(qkv.dtype.element_ty), mask=inside)
        tl.store(at + HALF, second.to(qkv.dtype.element_ty), mask=inside)
    if head >= HEADS:
        request = tl.load(request_of_row + row)
        token = tl.load(context + request) - (tl.load(row_start + request + 1) - row)
        table = pages + layer.to(tl.int64) * pages_per_layer + tl.load(page_start + request)
        page = tl.load(table + token // PAGE_TOKENS) + tl.load(layer_start + layer)
        within = (head - HEADS) * PAGE_TOKENS + token % PAGE_TOKENS
        ITEMSIZE: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
        to = pool + page // ITEMSIZE + within * 2 * HALF + lanes
        # The cache holds what qkv holds: rounded to qkv's dtype first.
        first = first.to(qkv.dtype.element_ty).to(tl.float32)
        second = second.to(qkv.dtype.element_ty).to(tl.float32)
        tl.store(to, first.to(pool.dtype.element_ty), mask=inside)
        tl.store(to + HALF, second.to(pool.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "pages_per_layer", "window"])
def attention_kernel(
    out,
    parts,
    qkv,
    pool,
    pages,
    page_start,
    layer_start,
    items,
    row_start,
    context,
    path_start,
    path_nodes,
    counts,
    layer,
    pages_per_layer,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    TREES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An item is (block of a request's rows, split of the context), taken once per KV head."""
    ITEMSIZE: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
    columns: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    # Query m is row m // GROUP of the block and query head m % GROUP of this KV head.
    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    below = tl.load(layer_start + layer)
    for index in range(tl.program_id(0), tl.load(counts + 1) * KV_HEADS, tl.num_programs(0)):
        item = items + index // KV_HEADS * 4
        kv_head = index % KV_HEADS
        request = tl.load(item)
        first_row = tl.load(item + 1)
        split = tl.load(item + 2)
        part = tl.load(item + 3)
        last_row = tl.load(row_start + request + 1)
        held = tl.load(context + request)
        if TREES:
            path = tl.load(path_start + first_row)
            length = tl.load(path_start + first_row + 1) - path
            # To a row of a tree its request ends with it; from here on keys lie along its path.
            before = held - (last_row - tl.load(row_start + request))
            last_row = tl.where(length > 0, first_row + 1, last_row)
            before = tl.where(length > 0, before, held)
            held = tl.where(length > 0, before + length, held)
        row = first_row + m // GROUP
        real = (m < ROWS * GROUP) & (row < last_row)
        token = held - (last_row - row)
        first_token = held - (last_row - first_row)
        end = tl.minimum(first_token + ROWS, held)
        low = tl.where(window > 0, tl.maximum(first_token + 1 - window, 0), 0)
        stop = tl.minimum((split + 1) * SPLIT, end)
        start = tl.maximum(split * SPLIT, low // KEYS * KEYS)
        head = kv_head * GROUP + m % GROUP
        at = qkv + row.to(tl.int64) * columns + head * DIM
        q = tl.load(at[:, None] + dims[None, :], mask=real[:, None] & wide[None, :], other=0)
        q = q.to(tl.float32)
        table = pages + layer.to(tl.int64) * pages_per_layer + tl.load(page_start + request)
        top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        # Of a split that lies before the window, start is behind stop and nothing is walked.
        for base in range(start, stop, KEYS):
            key = base + tl.arange(0, KEYS)
            held_key = (key < stop) & (key >= low)
            place = key
            if TREES:
                after = key - before
                along = held_key & (after >= 0)
                place = before + tl.load(path_nodes + path + after, mask=along, other=after)
            page = tl.load(table + place // PAGE_TOKENS, mask=held_key, other=0) + below
            from_ = page // ITEMSIZE + (kv_head * PAGE_TOKENS + place % PAGE_TOKENS) * DIM
            mask = held_key[:, None] & wide[None, :]
            k = tl.load(pool + from_[:, None] + dims[None, :], mask=mask, other=0).to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = held_key[None, :] & (key[None, :] <= token[:, None])
            seen = seen & ((window <= 0) | (key[None, :] > token[:, None] - window))
            scores = tl.where(seen, scores, float("-inf"))
            above = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen no key yet has no maximum to subtract.
            shift = tl.where(above == float("-inf"), 0.0, above)
            weights = tl.exp(scores - shift[:, None])
            keep = tl.exp(top - shift)
            mass = mass * keep + tl.sum(weights, 1)
            v_at = pool + from_[:, None] + KV_HEADS * PAGE_TOKENS * DIM + dims[None, :]
            v = tl.load(v_at, mask=mask, other=0).to(tl.float32)
            acc = tl.dot(weights, v, acc * keep[:, None], input_precision="tf32x3")
            top = above
        inside = real[:, None] & wide[None, :]
        if part < 0:
            lane = row.to(tl.int64) * HEADS + head
            result = (acc / tl.where(real, mass, 1.0)[:, None]).to(out.dtype.element_ty)
            tl.store(out + lane[:, None] * DIM + dims[None, :], result, mask=inside)
        else:
            lane = (part.to(tl.int64) * ROWS + row - first_row) * HEADS + head
            to = parts + lane * (DIM + 2)
            tl.store(to[:, None] + dims[None, :], acc, mask=inside)
            tl.store(to + DIM, top, mask=real)
            tl.store(to + DIM + 1, mass, mask=real)


@triton.jit(do_not_specialize=["window"])
def fold_kernel(
    out,
    parts,
    request_of_row,
    rows,
    row_start,
    context,
    path_start,
    counts,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    TREES: tl.constexpr,
):
    """An item is a row in parts, taken once per head: its own splits in order."""
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    for index in range(tl.program_id(0), tl.load(counts + 2) * HEADS, tl.num_programs(0)):
        item = rows + index // HEADS * 4
        head = index % HEADS
        row = tl.load(item)
        request = tl.load(request_of_row + row)
        token = tl.load(context + request) - (tl.load(row_start + request + 1) - row)
        if TREES:
            length = tl.load(path_start + row + 1) - tl.load(path_start + row)
            shallower = row - tl.load(row_start + request) + 1 - length
            token = tl.where(length > 0, token - shallower, token)
        low = tl.where(window > 0, tl.maximum(token + 1 - window, 0), 0)
        # Part p of the block holds row r of it at p * ROWS + r.
        within = row - tl.load(item + 1)
        first_part = tl.load(item + 2)
        top = tl.full((), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((), dtype=tl.float32)
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for split in range(low // SPLIT, token // SPLIT + 1):
            lane = ((first_part + split).to(tl.int64) * ROWS + within) * HEADS + head
            at = parts + lane * (DIM + 2)
            part = tl.load(at + dims, mask=wide, other=0)
            part_top = tl.load(at + DIM)
            part_mass = tl.load(at + DIM + 1)
            above = tl.maximum(top, part_top)
            keep, take = tl.exp(top - above), tl.exp(part_top - above)
            acc = acc * keep + part * take
            mass = mass * keep + part_mass * take
            top = above
        to = out + (row.to(tl.int64) * HEADS + head) * DIM + dims
        tl.store(to, (acc / mass).to(out.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=["per_layer"])
def compact_kernel(
    pool,
    source,
    target,
    start,
    layer_start,
    per_layer,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (layer, request, head of k or v) makes the request's moves one by one: what one
    takes another may have to overwrite."""
    layer = tl.program_id(0)
    head = tl.program_id(2)
    ITEMSIZE: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
    below = tl.load(layer_start + layer)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < DIM
    first = tl.load(start + tl.program_id(1))
    last = tl.load(start + tl.program_id(1) + 1)
    for move in range(first, last):
        index = layer.to(tl.int64) * per_layer + move
        from_ = (tl.load(source + index) + below) // ITEMSIZE + head * PLANE + lanes
        to = (tl.load(target + index) + below) // ITEMSIZE + head * PLANE + lanes
        moved = tl.load(pool + from_, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(pool + to, moved, mask=inside)
        tl.debug_barrier()
