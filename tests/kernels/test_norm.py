"""Norms and the gated activation against float64."""

from __future__ import annotations

import pytest
import torch

from loramux_kernels import dispatch, norm
from loramux_kernels.testing import assert_close, assert_same

torch.set_num_threads(1)

EPS = 1e-5
BECAUSE = "an fp32 mean of squares, one root and two products: a few units of 2^-24"
BACKENDS = ["reference", "cpu"]


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("count", "width"), [(1, 1), (3, 17), (5, 576), (2, 15), (0, 8), (9, 2048)]
)
def test_rms_norm(count: int, width: int, backend: dispatch.Backend) -> None:
    x, weight = rows(count, width), rows(width, seed=1)
    out = torch.empty_like(x)
    with dispatch.using(backend):
        norm.rms_norm(out, x, weight, EPS)
        expected = normed(x, weight)
        assert_close(out.double(), expected, rtol=2e-6, atol=1e-7, because=BECAUSE)
        norm.rms_norm(x, x, weight, EPS)
    assert_same(x, out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [7, 64, 100])
def test_add_rms_norm(width: int, backend: dispatch.Backend) -> None:
    x, residual, weight = rows(4, width), rows(4, width, seed=2), rows(width, seed=1)
    total = residual + x
    with dispatch.using(backend):
        norm.add_rms_norm(x, residual, x, weight, EPS)
    assert_same(residual, total)
    assert_close(x.double(), normed(total, weight), rtol=2e-6, atol=1e-7, because=BECAUSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 1, 64), (1, 1, 20)])
def test_head_rms_norm(heads: int, kv_heads: int, dim: int, backend: dispatch.Backend) -> None:
    qkv = rows(3, (heads + 2 * kv_heads) * dim)
    q_weight, k_weight = rows(dim, seed=1), rows(dim, seed=2)
    split = qkv.clone().view(3, -1, dim)
    with dispatch.using(backend):
        norm.head_rms_norm(
            qkv,
            q_weight,
            k_weight,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            eps=EPS,
        )
    got = qkv.view(3, -1, dim)
    q, k = split[:, :heads], split[:, heads : heads + kv_heads]
    expected = torch.cat((normed(q, q_weight), normed(k, k_weight)), dim=1)
    assert_close(
        got[:, : heads + kv_heads].double(), expected, rtol=2e-6, atol=1e-7, because=BECAUSE
    )
    assert_same(got[:, heads + kv_heads :], split[:, heads + kv_heads :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (2, 19), (3, 1536), (0, 5)])
def test_silu_mul(count: int, width: int, backend: dispatch.Backend) -> None:
    gate_up = rows(count, 2 * width) * 20
    out = torch.empty(count, width)
    with dispatch.using(backend):
        norm.silu_mul(out, gate_up)
    gate, up = gate_up.double().split(width, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    assert_close(
        out.double(), expected, rtol=1e-6, atol=1e-30, because="exp within 1 ulp, four roundings"
    )


def test_silu_at_the_ends_of_fp32() -> None:
    gate = torch.tensor([[0.0, -0.0, 89.0, -89.0, 1e38, -1e38, float("inf"), float("nan")]])
    out = torch.empty(1, 8)
    norm.silu_mul(out, torch.cat((gate, torch.ones(1, 8)), dim=1))
    assert out[0, :7].tolist() == [0, 0, 89, 0, pytest.approx(1e38), 0, float("inf")]
    assert out[0, 7].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates_within_its_row(backend: dispatch.Backend) -> None:
    x = rows(3, 33)
    x[1, 32] = float("nan")
    out = torch.empty_like(x)
    with dispatch.using(backend):
        norm.rms_norm(out, x, torch.ones(33), EPS)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("width", [24, 576, 577])
def test_a_rows_bits_do_not_depend_on_the_batch(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    row, weight = rows(1, width), rows(width, seed=1)
    gate_up = rows(1, 2 * width, seed=4)
    alone, alone_gated = torch.empty(1, width), torch.empty(1, width)
    norm.rms_norm(alone, row, weight, EPS)
    norm.silu_mul(alone_gated, gate_up)
    for _ in range(200):
        count, at = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(2))
        at %= count
        x = torch.randn(count, width, generator=generator)
        x[at] = row
        out = torch.empty_like(x)
        norm.rms_norm(out, x, weight, EPS)
        assert torch.equal(out[at], alone[0])
        pairs = torch.randn(count, 2 * width, generator=generator)
        pairs[at] = gate_up
        norm.silu_mul(out, pairs)
        assert torch.equal(out[at], alone_gated[0])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: every operand must be contiguous \[2, 8\]"):
        norm.rms_norm(torch.zeros(2, 8), torch.zeros(2, 9), torch.zeros(8), EPS)
    with pytest.raises(ValueError, match=r"gate_up must be \[2, 16\]"):
        norm.silu_mul(torch.zeros(2, 8), torch.zeros(2, 8))
