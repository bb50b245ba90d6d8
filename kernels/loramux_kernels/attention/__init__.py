"""Attention over paged KV: ``out = softmax(scale * q K^T, causal, windowed) V``, ragged rows, of
chains and of trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loramux_kernels.attention.moves import Moves
from loramux_kernels.attention.pages import Pages
from loramux_kernels.attention.paths import Paths
from loramux_kernels.dispatch import implementation

__all__ = ["Pages", "Paths", "compact", "paged_attention", "rope_store"]


def rope_store(
    qkv: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    arena: torch.Tensor,
    pages: Pages,
    layer: int,
    num_heads: int,
) -> None:
    """Rotate q and k in place and write this step's k and v into the arena.

    ``qkv`` is [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; ``cos`` and ``sin``
    [max_positions, head_dim / 2] fp32; ``positions`` [>= rows] int64 on qkv's device. Element d
    of a head turns with element d + head_dim / 2 (Hugging Face's half-split form of RoPE, arXiv
    2104.09864). Rows at and after ``pages.num_rows`` are padding and stay as they are.
    """
    _check(qkv, arena, pages, num_heads)
    if positions.dtype != torch.int64 or positions.shape[0] < pages.num_rows:
        raise ValueError(f"rope_store: positions must be int64 with {pages.num_rows} rows")
    if cos.shape != sin.shape or cos.shape[1] * 2 != pages.head_dim:
        raise ValueError(
            f"rope_store: cos and sin must be [positions, {pages.head_dim // 2}], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if not (cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()):
        raise ValueError("rope_store: cos, sin and positions must be contiguous")
    implementation(__name__, qkv).rope_store(
        qkv, cos, sin, positions, arena, pages, layer, num_heads
    )


def paged_attention(
    out: torch.Tensor,
    qkv: torch.Tensor,
    *,
    arena: torch.Tensor,
    pages: Pages,
    layer: int,
    num_heads: int,
    scale: float,
    window: int,
) -> None:
    """Causal attention of this step's rows over everything their requests hold in the arena.

    q is the first ``num_heads * head_dim`` columns of ``qkv`` [T, (H + 2 * KH) * D]; ``out`` is
    [T, H * D]. The step's own k and v must be stored already. ``window`` w > 0 keeps the keys
    with position > query position - w; 0 keeps all. The softmax is computed online in one pass
    (FlashAttention, arXiv 2205.14135) in blocks that start at absolute offsets of the row's own
    context, so a row's bits do not depend on its neighbours: a row of a tree has those that it has
    at the end of the chain of its ancestors. Padding rows of ``out`` stay.
    """
    _check(qkv, arena, pages, num_heads)
    if out.shape != (qkv.shape[0], num_heads * pages.head_dim) or not out.is_contiguous():
        raise ValueError(
            f"paged_attention: out must be contiguous [{qkv.shape[0]}, "
            f"{num_heads * pages.head_dim}], got {list(out.shape)}"
        )
    if window < 0:
        raise ValueError(f"paged_attention: window must not be negative, got {window}")
    implementation(__name__, out).paged_attention(
        out, qkv, arena, pages, layer, num_heads, scale, window
    )


def compact(arena: torch.Tensor, *, pages: Pages, kept: Mapping[int, Sequence[int]]) -> None:
    """Bring the keys and values of the nodes ``kept[r]`` behind each other, in all layers.

    ``pages`` are those of the step that stored them; ``kept[r]`` are rows of its request r, from 0
    and ascending: afterwards the i-th lies where row i of a chain does, and what lay there and
    between is lost. Nodes that are in place are not touched, and without others nothing runs.
    """
    moves = Moves.of(pages, kept)
    if moves is not None:
        implementation(__name__, arena.view(pages.dtype)).compact(arena, pages, moves)


def _check(qkv: torch.Tensor, arena: torch.Tensor, pages: Pages, num_heads: int) -> None:
    columns = (num_heads + 2 * pages.num_kv_heads) * pages.head_dim
    if qkv.shape[1:] != (columns,) or not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous [T, {columns}], got {list(qkv.shape)}")
    if pages.num_rows > qkv.shape[0]:
        raise ValueError(f"pages cover {pages.num_rows} rows, qkv has {qkv.shape[0]}")
    if num_heads % pages.num_kv_heads:
        raise ValueError(f"{num_heads} heads do not divide over {pages.num_kv_heads} KV heads")
    if arena.dtype != torch.uint8 or arena.dim() != 1:
        raise ValueError("arena must be a 1-D uint8 tensor")
