"""Entropy on CPUs (numba): one thread a row, summed in columns like the sampler's other masses."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray

from loramux_kernels.sampling import Float64
from loramux_kernels.sampling.cpu import (
    _LOG2E,
    GROUP,
    Real,
    Row,
    _exp,
    _group,
    _jit,
    _maxima,
    _new_maxima,
    _parallel,
)


@_jit
def _entropy(row: Row, maxima: Row) -> Real:
    """In bits: log2 of the sum of all weights, less the mean exponent."""
    peak = np.float64(maxima.max())
    weights = np.zeros(GROUP, np.float64)
    exponents = np.zeros(GROUP, np.float64)
    for g in range(len(maxima)):
        group = _group(row, g)
        for i in range(len(group)):
            x = max(np.float64(group[i]) - peak, -700.0)  # a weight of e^-700 adds nothing
            weight = _exp(x)
            weights[i] += weight
            exponents[i] += weight * x
    total = weights.sum()
    return (math.log(total) - exponents.sum() / total) * _LOG2E


@_parallel
def _entropies(logits: NDArray[np.float32], bits: Float64) -> None:
    for r in prange(logits.shape[0]):
        maxima = _new_maxima(logits[r])
        if not _maxima(logits[r], maxima)[1]:
            bits[r] = _entropy(logits[r], maxima)


def entropy_bits(logits: torch.Tensor) -> Float64:
    """See ``loramux_kernels.sampling.entropy_bits``."""
    bits = np.full(len(logits), np.nan)
    _entropies(logits.numpy(), bits)
    return bits
