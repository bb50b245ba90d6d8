"""Norms and the gated activation on the CPU: rows in parallel, one fixed order within a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import inner, parallel


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """See :func:`loramux_kernels.norm.rms_norm`."""
    dispatch.calls["cpu:rms_norm"] += 1
    rms_norm_rows(out.numpy(), x.numpy(), weight.numpy(), eps)


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """See :func:`loramux_kernels.norm.add_rms_norm`."""
    dispatch.calls["cpu:add_rms_norm"] += 1
    add_rms_norm_rows(out.numpy(), residual.numpy(), x.numpy(), weight.numpy(), eps)


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
    dispatch.calls["cpu:head_rms_norm"] += 1
    head_rms_norm_rows(
        qkv.numpy(), q_weight.numpy(), k_weight.numpy(), num_heads, num_kv_heads, head_dim, eps
    )


def silu_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """See :func:`loramux_kernels.norm.silu_mul`."""
    dispatch.calls["cpu:silu_mul"] += 1
    silu_mul_rows(out.numpy(), gate_up.numpy())


@inner
def _norm_row(out: Any, to: int, x: Any, at: int, weight: Any, width: int, eps: float) -> None:
    whole = width // 16 * 16
    squares = simd.splat(np.float32(0))
    for k in range(0, whole, 16):
        v = simd.load(x, at + k)
        squares = simd.fma(v, v, squares)
    if whole < width:
        v = simd.load_part(x, at + whole, width - whole)
        squares = simd.fma(v, v, squares)
    mean = simd.total(squares) / np.float32(width)
    inverse = simd.splat(np.float32(1) / np.sqrt(mean + np.float32(eps)))
    for k in range(0, whole, 16):
        v = simd.mul(simd.load(x, at + k), inverse)
        simd.store(out, to + k, simd.mul(v, simd.load(weight, k)))
    if whole < width:
        left = width - whole
        v = simd.mul(simd.load_part(x, at + whole, left), inverse)
        simd.store_part(out, to + whole, simd.mul(v, simd.load_part(weight, whole, left)), left)


@parallel("void(float32[:,::1], float32[:,::1], float32[::1], float64)")
def rms_norm_rows(out: Any, x: Any, weight: Any, eps: float) -> None:
    rows, width = x.shape
    out, x = out.reshape(-1), x.reshape(-1)
    for row in prange(rows):
        _norm_row(out, row * width, x, row * width, weight, width, eps)


@parallel("void(float32[:,::1], float32[:,::1], float32[:,::1], float32[::1], float64)")
def add_rms_norm_rows(out: Any, residual: Any, x: Any, weight: Any, eps: float) -> None:
    rows, width = x.shape
    out, residual, x = out.reshape(-1), residual.reshape(-1), x.reshape(-1)
    for row in prange(rows):
        at, end = row * width, (row + 1) * width
        for k in range(at, end - 15, 16):
            simd.store(residual, k, simd.add(simd.load(residual, k), simd.load(x, k)))
        left = width % 16
        if left:
            k = end - left
            v = simd.add(simd.load_part(residual, k, left), simd.load_part(x, k, left))
            simd.store_part(residual, k, v, left)
        _norm_row(out, at, residual, at, weight, width, eps)


@parallel("void(float32[:,::1], float32[::1], float32[::1], int64, int64, int64, float64)")
def head_rms_norm_rows(
    qkv: Any,
    q_weight: Any,
    k_weight: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    rows, width = qkv.shape
    qkv = qkv.reshape(-1)
    for row in prange(rows):
        for head in range(num_heads + num_kv_heads):
            at = row * width + head * head_dim
            weight = q_weight if head < num_heads else k_weight
            _norm_row(qkv, at, qkv, at, weight, head_dim, eps)


@inner
def _silu(gate: Any) -> Any:
    one = simd.splat(np.float32(1))
    minus = simd.mul(gate, simd.splat(np.float32(-1)))
    return simd.div(gate, simd.add(one, simd.exp(minus)))


@parallel("void(float32[:,::1], float32[:,::1])")
def silu_mul_rows(out: Any, gate_up: Any) -> None:
    rows, width = out.shape
    out, gate_up = out.reshape(-1), gate_up.reshape(-1)
    for row in prange(rows):
        gate = row * 2 * width
        up = gate + width
        whole = width // 16 * 16
        for k in range(0, whole, 16):
            v = simd.mul(_silu(simd.load(gate_up, gate + k)), simd.load(gate_up, up + k))
            simd.store(out, row * width + k, v)
        if whole < width:
            left = width - whole
            v = _silu(simd.load_part(gate_up, gate + whole, left))
            v = simd.mul(v, simd.load_part(gate_up, up + whole, left))
            simd.store_part(out, row * width + whole, v, left)
