"""RMS norms ``x / sqrt(mean(x^2) + eps) * w`` (arXiv 1910.07467) and ``silu(g) * u``, in fp32."""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation

__all__ = ["add_rms_norm", "head_rms_norm", "rms_norm", "silu_mul"]


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """``out = norm(x) * weight``; all [T, width], weight [width]; out may be x."""
    _check("rms_norm", weight, out, x)
    implementation(__name__, out).rms_norm(out, x, weight, eps)


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """``residual += x``, then ``out = norm(residual) * weight``; all [T, width]; out may be x."""
    _check("add_rms_norm", weight, out, residual, x)
    implementation(__name__, out).add_rms_norm(out, residual, x, weight, eps)


def head_rms_norm(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """Norm each q and k head of ``qkv`` [T, (H + 2 * KH) * D] in place (Qwen3, before RoPE)."""
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.shape[1:] != (columns,) or not qkv.is_contiguous():
        raise ValueError(
            f"head_rms_norm: qkv must be contiguous [T, {columns}], got {list(qkv.shape)}"
        )
    if q_weight.shape != (head_dim,) or k_weight.shape != (head_dim,):
        raise ValueError(f"head_rms_norm: the weights must be [{head_dim}]")
    if not (q_weight.is_contiguous() and k_weight.is_contiguous()):
        raise ValueError("head_rms_norm: the weights must be contiguous")
    implementation(__name__, qkv).head_rms_norm(
        qkv, q_weight, k_weight, num_heads, num_kv_heads, head_dim, eps
    )


def silu_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """``out = silu(gate) * up`` with ``gate_up`` [T, 2 * width] and ``out`` [T, width]."""
    if gate_up.shape != (out.shape[0], 2 * out.shape[1]):
        raise ValueError(
            f"silu_mul: gate_up must be [{out.shape[0]}, {2 * out.shape[1]}], "
            f"got {list(gate_up.shape)}"
        )
    if not (out.is_contiguous() and gate_up.is_contiguous()):
        raise ValueError("silu_mul: out and gate_up must be contiguous")
    implementation(__name__, out).silu_mul(out, gate_up)


def _check(name: str, weight: torch.Tensor, *rows: torch.Tensor) -> None:
    if not weight.is_contiguous():
        raise ValueError(f"{name}: the weight must be contiguous")
    for tensor in rows:
        if tensor.shape != (rows[0].shape[0], weight.shape[0]) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: every operand must be contiguous [{rows[0].shape[0]}, "
                f"{weight.shape[0]}], got {list(tensor.shape)}"
            )
