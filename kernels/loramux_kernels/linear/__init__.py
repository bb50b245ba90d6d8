"""The base matmul ``out = x W^T``, and the layout its weights are kept in."""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation
from loramux_kernels.linear.matrix import Matrix

__all__ = ["Matrix", "gather", "project"]


def project(out: torch.Tensor, x: torch.Tensor, weight: Matrix) -> None:
    """``out[T, n] = x[T, k] @ W[n, k]^T`` for any ``T``; contiguous, ``out`` of ``x``'s dtype.

    On a CPU a row of ``out`` is the same bits among any other rows.
    """
    if x.shape[1:] != (weight.width_in,) or out.shape != (x.shape[0], weight.width_out):
        raise ValueError(
            f"project: {list(x.shape)} by [{weight.width_out}, {weight.width_in}] "
            f"does not give {list(out.shape)}"
        )
    if not (out.is_contiguous() and x.is_contiguous()):
        raise ValueError("project: out and x must be contiguous")
    implementation(__name__, out).project(out, x, weight)


def gather(out: torch.Tensor, weight: Matrix, ids: torch.Tensor) -> None:
    """``out[i] = W[ids[i]]``: token embeddings; ``ids`` are not checked."""
    if out.shape != (ids.shape[0], weight.width_in) or not out.is_contiguous():
        raise ValueError(f"gather: out must be [{ids.shape[0]}, {weight.width_in}], contiguous")
    implementation(__name__, out).gather(out, weight, ids)
