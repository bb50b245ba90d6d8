"""Scatter, slice by slice."""

from __future__ import annotations

import torch


def scatter(
    arena: torch.Tensor, staged: torch.Tensor, offsets: torch.Tensor, slice_bytes: int
) -> None:
    """See :func:`loramux_kernels.scatter.scatter`."""
    for offset, piece in zip(offsets.tolist(), torch.split(staged, slice_bytes), strict=True):
        arena[offset : offset + len(piece)] = piece
