"""One stream over many slices: ``arena[offset_i + j] = staged[i * slice_bytes + j]``, bytes."""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation

WORD_BYTES = 8
"""Slices, their offsets and a stream's end are multiples of it (the pool's are of 32 and more)."""


def scatter(
    arena: torch.Tensor,
    staged: torch.Tensor,
    offsets: torch.Tensor,
    *,
    slice_bytes: int,
) -> None:
    """Spread ``staged`` (1-D uint8) over the slices of ``arena`` (1-D uint8) that begin at the
    bytes ``offsets`` (int64), in order; the last slice may get less than ``slice_bytes``.

    One launch, however many slices. ValueError when the slices cannot hold what is staged.
    """
    num_bytes = staged.numel()
    if arena.dtype != torch.uint8 or staged.dtype != torch.uint8 or offsets.dtype != torch.int64:
        raise ValueError("scatter: arena and staged must be uint8, offsets int64")
    if arena.dim() != 1 or staged.dim() != 1 or offsets.dim() != 1:
        raise ValueError("scatter: arena, staged and offsets must have one dimension")
    if slice_bytes % WORD_BYTES or num_bytes % WORD_BYTES or arena.numel() % WORD_BYTES:
        raise ValueError(
            f"scatter: slices of {slice_bytes} bytes, {num_bytes} staged and an arena of "
            f"{arena.numel()} must be multiples of {WORD_BYTES}"
        )
    if offsets.shape[0] != -(-num_bytes // slice_bytes):
        raise ValueError(
            f"scatter: {num_bytes} bytes do not cover {offsets.shape[0]} slices of {slice_bytes}"
        )
    if num_bytes:
        implementation(__name__, arena).scatter(arena, staged, offsets, slice_bytes)
