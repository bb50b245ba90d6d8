"""cuBLAS: nothing of ours would be faster."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch
from loramux_kernels.linear.matrix import Matrix


def project(out: torch.Tensor, x: torch.Tensor, weight: Matrix) -> None:
    """See :func:`loramux_kernels.linear.project`."""
    dispatch.calls["gpu:project"] += 1
    torch.mm(x, weight.data.t(), out=out)


def gather(out: torch.Tensor, weight: Matrix, ids: torch.Tensor) -> None:
    """See :func:`loramux_kernels.linear.gather`."""
    dispatch.calls["gpu:gather"] += 1
    torch.index_select(weight.data, 0, ids, out=out)
