"""The obvious torch form."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch
from loramux_kernels.linear.matrix import Matrix


def project(out: torch.Tensor, x: torch.Tensor, weight: Matrix) -> None:
    dispatch.calls["reference:project"] += 1
    torch.mm(x, weight.dense().to(x.dtype).t(), out=out)


def gather(out: torch.Tensor, weight: Matrix, ids: torch.Tensor) -> None:
    dispatch.calls["reference:gather"] += 1
    out.copy_(weight.dense()[ids])
