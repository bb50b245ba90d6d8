"""Scatter in Triton: a program for each block of a slice, sixteen bytes a thread at a time."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch

BLOCK = 2048
"""Words of a program: 16 KiB, so that a transfer of a few MiB keeps every multiprocessor busy."""


def scatter(
    arena: torch.Tensor, staged: torch.Tensor, offsets: torch.Tensor, slice_bytes: int
) -> None:
    """See :func:`loramux_kernels.scatter.scatter`."""
    dispatch.calls["gpu:scatter"] += 1
    words = slice_bytes // 8
    scatter_kernel[(offsets.shape[0], triton.cdiv(words, BLOCK))](
        arena.view(torch.int64), staged.view(torch.int64), offsets, staged.numel() // 8,
        SLICE_WORDS=words, BLOCK=BLOCK, ALIGN=2 if words % 2 == 0 else 1, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def scatter_kernel(
    arena,
    staged,
    offsets,
    num_words,
    SLICE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Words ``program_id(1) * BLOCK ..`` of slice ``program_id(0)``. Offsets of slices of whole
    16 bytes are multiples of 16 too (``ALIGN`` 2), which lets loads and stores be that wide."""
    piece = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = piece.to(tl.int64) * SLICE_WORDS + at
    keep = (at < SLICE_WORDS) & (source < num_words)
    target = tl.multiple_of(tl.load(offsets + piece) // 8, ALIGN)
    tl.store(arena + target + at, tl.load(staged + source, mask=keep), mask=keep)
