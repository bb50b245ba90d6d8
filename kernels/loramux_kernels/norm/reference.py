"""The obvious torch form of the norms: fp32 inside, rounded to the dtype before the weight."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    dispatch.calls["reference:rms_norm"] += 1
    out.copy_(weight * _normalised(x, eps))


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    dispatch.calls["reference:add_rms_norm"] += 1
    residual += x
    out.copy_(weight * _normalised(residual, eps))


def head_rms_norm(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    dispatch.calls["reference:head_rms_norm"] += 1
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    q.copy_(q_weight * _normalised(q, eps))
    k.copy_(k_weight * _normalised(k, eps))


def silu_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    dispatch.calls["reference:silu_mul"] += 1
    gate, up = torch.split(gate_up, out.shape[1], dim=1)
    # The product is taken in the tensors' dtype, as a Hugging Face MLP does.
    out.copy_(torch.nn.functional.silu(gate.float()).to(out.dtype) * up)


def _normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
