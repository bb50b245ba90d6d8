"""What a call over all layers is given: the activations, and where each layer's weights lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.linear.matrix import DTYPES, Matrix


class Vector(IntEnum):
    """Columns of ``LayerTable.vectors``; the biases of the four matrices follow ``BIASES``."""

    INPUT_NORM = 0
    POST_NORM = 1
    Q_NORM = 2
    K_NORM = 3
    BIASES = 4


@dataclass(frozen=True)
class Work:
    """The activations of one batch, a row per token; all of one dtype and contiguous."""

    residual: torch.Tensor
    hidden: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    inner: torch.Tensor

    def first(self, rows: int) -> Work:
        """Views of the first ``rows`` rows."""
        return Work(*(getattr(self, field.name)[:rows] for field in fields(self)))


class LayerTable:
    """Addresses of every layer's weights; keeps the tensors alive that they belong to.

    ``matrices``, ``scales`` and ``dtypes`` (index into ``DTYPES``) are [layers, 4]: qkv, o,
    gate_up, down. ``vectors`` is [layers, 8], see :class:`Vector`; 0 where a layer has none.
    ``windows`` is [layers].
    """

    def __init__(
        self,
        matrices: Sequence[Sequence[Matrix]],
        vectors: Sequence[Sequence[torch.Tensor | None]],
        *,
        windows: Sequence[int],
        num_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        for vector in (v for row in vectors for v in row if v is not None):
            if vector.dtype != torch.float32 or not vector.is_contiguous():
                raise ValueError("LayerTable: vectors must be contiguous and float32")
        self._alive: Any = (matrices, vectors)
        self.matrices = _table([[m.data.data_ptr() for m in row] for row in matrices])
        self.scales = _table([[m.scales.data_ptr() for m in row] for row in matrices])
        self.dtypes = _table([[DTYPES.index(m.data.dtype) for m in row] for row in matrices])
        self.vectors = _table([[0 if v is None else v.data_ptr() for v in row] for row in vectors])
        self.windows = np.array(windows, np.int64)
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.eps = eps


def _table(rows: list[list[int]]) -> npt.NDArray[np.int64]:
    return np.array(rows, np.int64)
