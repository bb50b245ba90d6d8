"""The obvious torch form of RoPE, the KV store and paged attention."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch
from loramux_kernels.attention.moves import Moves
from loramux_kernels.attention.pages import Pages


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
    dispatch.calls["reference:rope_store"] += 1
    total, dim, kv_heads = pages.num_rows, pages.head_dim, pages.num_kv_heads
    heads = qkv[:total].view(total, num_heads + 2 * kv_heads, dim)
    turned = heads[:, : num_heads + kv_heads]
    first, second = torch.split(turned.float(), dim // 2, dim=2)
    c, s = (table[positions[:total]].unsqueeze(1) for table in (cos, sin))
    turned.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=2))
    for request in range(len(pages.context)):
        rows = range(int(pages.row_start[request]), int(pages.row_start[request + 1]))
        for row in rows:
            position = int(pages.context[request]) - (rows.stop - row)
            slot = page(arena, pages, layer, request, position // pages.page_tokens)
            kv = heads[row, num_heads:].view(2, kv_heads, dim)
            slot[:, :, position % pages.page_tokens] = kv.to(pages.dtype)


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
    dispatch.calls["reference:paged_attention"] += 1
    dim, kv_heads = pages.head_dim, pages.num_kv_heads
    for request in range(len(pages.context)):
        begin, end = (int(i) for i in pages.row_start[request : request + 2])
        if begin == end:
            continue
        context = int(pages.context[request])
        num_pages = -(-context // pages.page_tokens)
        kv = torch.cat([page(arena, pages, layer, request, p) for p in range(num_pages)], dim=2)
        k, v = kv[:, :, :context].float().repeat_interleave(num_heads // kv_heads, dim=1)
        q = qkv[begin:end, : num_heads * dim].view(-1, num_heads, dim).transpose(0, 1).float()
        seen = _seen(pages, request, window).to(out.device)
        scores = (scale * (q @ k.transpose(1, 2))).masked_fill(~seen, float("-inf"))
        rows = torch.softmax(scores, dim=2) @ v
        out[begin:end] = rows.transpose(0, 1).reshape(end - begin, -1).to(out.dtype)


def _seen(pages: Pages, request: int, window: int) -> torch.Tensor:
    """Which of the keys, where they lie, each of the request's rows sees: bool [rows, context]."""
    begin, end = (int(i) for i in pages.row_start[request : request + 2])
    context = int(pages.context[request])
    held = context - (end - begin)
    seen = torch.zeros(end - begin, context, dtype=torch.bool)
    for row in range(end - begin):
        places = torch.arange(held + row + 1)
        if pages.paths is not None:
            first, last = (int(i) for i in pages.paths.start[begin + row : begin + row + 2])
            if first < last:
                path = torch.from_numpy(pages.paths.nodes[first:last])
                places = torch.cat((torch.arange(held), held + path))
        seen[row, places[-window if window else 0 :]] = True
    return seen


def compact(arena: torch.Tensor, pages: Pages, moves: Moves) -> None:
    """See :func:`loramux_kernels.attention.compact`."""
    dispatch.calls["reference:compact"] += 1
    size = pages.head_dim * pages.dtype.itemsize
    planes = torch.arange(2 * pages.num_kv_heads, device=arena.device).unsqueeze(1)
    token = planes * pages.page_tokens * size + torch.arange(size, device=arena.device)
    for layer in range(len(moves.source)):
        for source, target in zip(moves.source[layer], moves.target[layer], strict=True):
            arena[token + int(target)] = arena[token + int(source)]


def page(arena: torch.Tensor, pages: Pages, layer: int, request: int, index: int) -> torch.Tensor:
    """One page as a [2, num_kv_heads, page_tokens, head_dim] view of the arena."""
    shape = (2, pages.num_kv_heads, pages.page_tokens, pages.head_dim)
    size = pages.dtype.itemsize
    for extent in shape:
        size *= extent
    at = int(pages.offsets[layer, request, index])
    return arena[at : at + size].view(pages.dtype).view(shape)
