"""RoPE, the KV store and paged attention in Triton.

Attention splits every context at multiples of SPLIT keys and walks a split in blocks of KEYS, so
a row meets its keys in one order whatever else is in the batch. When any context is longer than
a split, each split is a program of its own (Flash-Decoding) and a second kernel folds the parts
in order; a row with one part gets the same bits as without folding.
"""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch
from loramux_kernels.attention.pages import ROW_BLOCK, Pages

KEYS = 32
SPLIT = 1024


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
    step = pages.tensors(qkv.device)
    half = pages.head_dim // 2
    rope_store_kernel[(pages.num_rows, num_heads + 2 * pages.num_kv_heads)](
        qkv,
        cos,
        sin,
        positions,
        arena.view(pages.dtype),
        step["offsets"][layer],
        step["request_of_row"],
        step["row_start"],
        step["context"],
        pages.offsets.shape[2],
        HEADS=num_heads,
        KV_HEADS=pages.num_kv_heads,
        PAGE_TOKENS=pages.page_tokens,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        num_warps=1,
        enable_fp_fusion=True,
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
    step = pages.tensors(qkv.device)
    group = num_heads // pages.num_kv_heads
    rows = 1 if pages.num_rows == len(pages.block_row) else ROW_BLOCK
    splits = triton.cdiv(int(pages.context.max()), SPLIT)
    head_rows = pages.num_rows * num_heads
    parts = out
    bounds = out
    if splits > 1:
        shape = (splits, head_rows, pages.head_dim)
        parts = torch.empty(shape, dtype=torch.float32, device=out.device)
        bounds = torch.empty((splits, head_rows, 2), dtype=torch.float32, device=out.device)
    dispatch.calls["gpu:paged_attention"] += 1
    attention_kernel[(len(pages.block_row), pages.num_kv_heads, splits)](
        out,
        parts,
        bounds,
        qkv,
        arena.view(pages.dtype),
        step["offsets"][layer],
        step["block_request"],
        step["block_row"],
        step["row_start"],
        step["context"],
        pages.offsets.shape[2],
        head_rows,
        scale,
        window,
        HEADS=num_heads,
        KV_HEADS=pages.num_kv_heads,
        PAGE_TOKENS=pages.page_tokens,
        DIM=pages.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(pages.head_dim)),
        ROWS=rows,
        GROUP=group,
        BLOCK_M=max(16, triton.next_power_of_2(rows * group)),
        KEYS=KEYS,
        SPLIT=SPLIT,
        ALONE=splits == 1,
        PRECISION="tf32" if qkv.dtype != torch.float32 else "tf32x3",
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=2,
    )
    if splits == 1:
        return
    dispatch.calls["gpu:fold_attention"] += 1
    fold_kernel[(pages.num_rows, num_heads)](
        out,
        parts,
        bounds,
        step["request_of_row"],
        step["row_start"],
        step["context"],
        head_rows,
        window,
        HEADS=num_heads,
        DIM=pages.head_dim,
        BLOCK_D=triton.next_power_of_2(pages.head_dim),
        SPLIT=SPLIT,
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["max_pages"])
def rope_store_kernel(
    qkv,
    cos,
    sin,
    positions,
    pool,
    offsets,
    request_of_row,
    row_start,
    context,
    max_pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (row, head of q, k or v)."""
    row, head = tl.program_id(0), tl.program_id(1)
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
        page = tl.load(offsets + request.to(tl.int64) * max_pages + token // PAGE_TOKENS)
        within = (head - HEADS) * PAGE_TOKENS + token % PAGE_TOKENS
        ITEMSIZE: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
        to = pool + page // ITEMSIZE + within * 2 * HALF + lanes
        # The cache holds what qkv holds: rounded to qkv's dtype first.
        first = first.to(qkv.dtype.element_ty).to(tl.float32)
        second = second.to(qkv.dtype.element_ty).to(tl.float32)
        tl.store(to, first.to(pool.dtype.element_ty), mask=inside)
        tl.store(to + HALF, second.to(pool.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_pages", "head_rows", "window"])
def attention_kernel(
    out,
    parts,
    bounds,
    qkv,
    pool,
    offsets,
    block_request,
    block_row,
    row_start,
    context,
    max_pages,
    head_rows,
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
    ALONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program per (block of a request's rows, KV head, split of the context)."""
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(block_request + block)
    first_row = tl.load(block_row + block)
    last_row = tl.load(row_start + request + 1)
    # Query m is row m // GROUP and query head m % GROUP of this KV head.
    m = tl.arange(0, BLOCK_M)
    row = first_row + m // GROUP
    real = (m < ROWS * GROUP) & (row < last_row)
    held = tl.load(context + request)
    token = held - (last_row - row)
    first_token = held - (last_row - first_row)
    end = tl.minimum(first_token + ROWS, held)
    low = tl.where(window > 0, tl.maximum(first_token + 1 - window, 0), 0)
    stop = tl.minimum((split + 1) * SPLIT, end)
    start = tl.maximum(split * SPLIT, low // KEYS * KEYS)
    if start >= stop:
        return
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    columns: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    head = kv_head * GROUP + m % GROUP
    at = qkv + row.to(tl.int64) * columns + head * DIM
    q = tl.load(at[:, None] + dims[None, :], mask=real[:, None] & wide[None, :], other=0)
    q = q.to(tl.float32)
    ITEMSIZE: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
    table = offsets + request.to(tl.int64) * max_pages
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for base in range(start, stop, KEYS):
        key = base + tl.arange(0, KEYS)
        held_key = (key < stop) & (key >= low)
        page = tl.load(table + key // PAGE_TOKENS, mask=held_key, other=0) // ITEMSIZE
        from_ = page + (kv_head * PAGE_TOKENS + key % PAGE_TOKENS) * DIM
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
    lane = row.to(tl.int64) * HEADS + head
    if ALONE:
        to = out + lane[:, None] * DIM + dims[None, :]
        result = (acc / tl.where(real, mass, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(to, result, mask=real[:, None] & wide[None, :])
    else:
        lane += split.to(tl.int64) * head_rows
        to = parts + lane[:, None] * DIM + dims[None, :]
        tl.store(to, acc, mask=real[:, None] & wide[None, :])
        tl.store(bounds + lane * 2, top, mask=real)
        tl.store(bounds + lane * 2 + 1, mass, mask=real)


@triton.jit(do_not_specialize=["head_rows", "window"])
def fold_kernel(
    out,
    parts,
    bounds,
    request_of_row,
    row_start,
    context,
    head_rows,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A program per (row, head): the row's own splits in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(request_of_row + row)
    token = tl.load(context + request) - (tl.load(row_start + request + 1) - row)
    low = tl.where(window > 0, tl.maximum(token + 1 - window, 0), 0)
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    lane = row.to(tl.int64) * HEADS + head
    top = tl.full((), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((), dtype=tl.float32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for split in range(low // SPLIT, token // SPLIT + 1):
        at = lane + split * head_rows
        part = tl.load(parts + at * DIM + dims, mask=wide, other=0)
        part_top = tl.load(bounds + at * 2)
        part_mass = tl.load(bounds + at * 2 + 1)
        above = tl.maximum(top, part_top)
        keep, take = tl.exp(top - above), tl.exp(part_top - above)
        acc = acc * keep + part * take
        mass = mass * keep + part_mass * take
        top = above
    tl.store(out + lane * DIM + dims, (acc / mass).to(out.dtype.element_ty), mask=wide)
