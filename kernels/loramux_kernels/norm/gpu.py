"""Norms and the gated activation in Triton: a program per row (or head), fp32 inside."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch
from loramux_kernels.tuning import table_of


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """See :func:`loramux_kernels.norm.rms_norm`."""
    dispatch.calls["gpu:rms_norm"] += 1
    rows, width = x.shape
    if rows:
        launch = table_of(x.device).launch("norm", width)
        # Without an addition the residual is neither read nor written.
        norm_kernel[(rows, 1)](
            out, x, x, weight, weight, eps, width, 1,
            WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=False,
            **launch.options,
        )  # fmt: skip


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """See :func:`loramux_kernels.norm.add_rms_norm`."""
    dispatch.calls["gpu:add_rms_norm"] += 1
    rows, width = x.shape
    if rows:
        launch = table_of(x.device).launch("norm", width)
        norm_kernel[(rows, 1)](
            out, residual, x, weight, weight, eps, width, 1,
            WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=True,
            **launch.options,
        )  # fmt: skip


def head_rms_norm(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """See :func:`loramux_kernels.norm.head_rms_norm`."""
    dispatch.calls["gpu:head_rms_norm"] += 1
    rows, width = qkv.shape
    if rows:
        launch = table_of(qkv.device).launch("norm", head_dim)
        norm_kernel[(rows, num_heads + num_kv_heads)](
            qkv, qkv, qkv, q_weight, k_weight, eps, width, num_heads,
            WIDTH=head_dim, BLOCK=triton.next_power_of_2(head_dim), ADD=False,
            **launch.options,
        )  # fmt: skip


def silu_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """See :func:`loramux_kernels.norm.silu_mul`."""
    dispatch.calls["gpu:silu_mul"] += 1
    rows, width = out.shape
    if rows:
        launch = table_of(out.device).launch("silu_mul")
        silu_mul_kernel[(rows, triton.cdiv(width, launch.block))](
            out,
            gate_up,
            width,
            BLOCK=launch.block,
            **launch.options,
        )


@triton.jit
def norm_kernel(
    out,
    residual,
    x,
    weight,
    late_weight,
    eps,
    stride,
    late,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Norm the WIDTH elements at (row, part); parts from ``late`` on take ``late_weight``."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < WIDTH
    at = row * stride + part * WIDTH + lanes
    values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if ADD:
        values += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
        tl.store(residual + at, values.to(residual.dtype.element_ty), mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    values = (values * inverse).to(out.dtype.element_ty).to(tl.float32)
    weights = tl.where(part < late, weight, late_weight)
    values *= tl.load(weights + lanes, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(out, gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < width
    gate = tl.load(gate_up + row * 2 * width + lanes, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + lanes, mask=inside, other=0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + lanes, (activated * up).to(out.dtype.element_ty), mask=inside)
