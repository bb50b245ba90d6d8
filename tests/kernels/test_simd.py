"""The fp32 lanes: conversions exact, exp within an ulp, parts that touch nothing else."""

from __future__ import annotations

import numpy as np
from numba import njit

from loramux_kernels import simd


@njit
def widen_f16(out, half):  # type: ignore[no-untyped-def]
    for at in range(0, len(out), 16):
        simd.store(out, at, simd.load_f16(half, at))


@njit
def widen_bf16(out, half):  # type: ignore[no-untyped-def]
    for at in range(0, len(out), 16):
        simd.store(out, at, simd.load_bf16(half, at))


@njit
def exponential(out, x):  # type: ignore[no-untyped-def]
    for at in range(0, len(out), 16):
        simd.store(out, at, simd.exp(simd.load(x, at)))


@njit
def copy_part(out, x, at, count):  # type: ignore[no-untyped-def]
    simd.store_part(out, at, simd.load_part(x, at, count), count)


@njit
def total_of_part(x, count):  # type: ignore[no-untyped-def]
    return simd.total(simd.load_part(x, 0, count))


@njit
def largest(x):  # type: ignore[no-untyped-def]
    return simd.largest(simd.load(x, 0))


def test_every_float16_is_widened_exactly() -> None:
    half = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, dtype=np.float32)
    widen_f16(out, half)
    expected = half.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(out[~number]).all()


def test_every_bfloat16_is_widened_exactly() -> None:
    half = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, dtype=np.float32)
    widen_bf16(out, half)
    np.testing.assert_array_equal(out.view(np.uint32), half.astype(np.uint32) << 16)


def test_exp_is_right_to_one_part_in_2_to_the_23() -> None:
    x = np.linspace(-87.3, 88.3, 1 << 18, dtype=np.float32)
    out = np.empty_like(x)
    exponential(out, x)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(out - expected) <= 2.0**-23 * expected).all()


def test_exp_at_the_ends() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 89, -88, 1e30, -1e30] + [1] * 7, np.float32)
    out = np.empty_like(x)
    exponential(out, x)
    assert np.isnan(out[0])
    assert out[1:9].tolist() == [np.inf, 0, 1, 1, np.inf, 0, np.inf, 0]


def test_parts_leave_the_rest_alone() -> None:
    x = np.arange(40, dtype=np.float32)
    for count in range(17):
        out = np.full(40, -1, dtype=np.float32)
        copy_part(out, x, 3, count)
        expected = np.full(40, -1, dtype=np.float32)
        expected[3 : 3 + count] = x[3 : 3 + count]
        np.testing.assert_array_equal(out, expected)


def test_folds() -> None:
    x = np.arange(1, 17, dtype=np.float32)
    assert [total_of_part(x, n) for n in range(17)] == [n * (n + 1) / 2 for n in range(17)]
    for place in range(16):
        y = np.full(16, -np.inf, dtype=np.float32)
        y[place] = -3
        assert largest(y) == -3
