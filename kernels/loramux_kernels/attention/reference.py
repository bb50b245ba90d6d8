"""The obvious torch form of RoPE, the KV store and paged attention."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch
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
        query = torch.arange(context - (end - begin), context, device=out.device).unsqueeze(1)
        key = torch.arange(context, device=out.device)
        seen = key <= query
        if window:
            seen &= key > query - window
        scores = (scale * (q @ k.transpose(1, 2))).masked_fill(~seen, float("-inf"))
        rows = torch.softmax(scores, dim=2) @ v
        out[begin:end] = rows.transpose(0, 1).reshape(end - begin, -1).to(out.dtype)


def page(arena: torch.Tensor, pages: Pages, layer: int, request: int, index: int) -> torch.Tensor:
    """One page as a [2, num_kv_heads, page_tokens, head_dim] view of the arena."""
    shape = (2, pages.num_kv_heads, pages.page_tokens, pages.head_dim)
    size = pages.dtype.itemsize
    for extent in shape:
        size *= extent
    at = int(pages.offsets[layer, request, index])
    return arena[at : at + size].view(pages.dtype).view(shape)
