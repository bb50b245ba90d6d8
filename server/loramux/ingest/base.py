"""The base's weights as its checkpoint holds them, read when a format needs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import ITEMSIZE, STORAGE, widen
from loramux.model.checkpoint import TensorBytes, read_checkpoint
from loramux.wire import module_path

_BLOCK_ELEMENTS = 1 << 22


class CheckpointWeights:
    """``BaseWeights`` of a model directory. Opened when something is asked for, and not before:
    most adapters do not. Raises ConfigError when the directory is no longer what it was."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _tensors(self) -> dict[str, TensorBytes]:
        return read_checkpoint(self._directory)

    def blocks(self, layer: int, module: str) -> Iterator[Float32]:
        """See BaseWeights."""
        name = f"{_name(layer, module)}.weight"
        if module == "lm_head" and name not in self._tensors:  # tied
            name = "model.embed_tokens.weight"
        tensor = self._tensors[name]
        rows, width = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
        step = max(1, _BLOCK_ELEMENTS // width)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            yield _read(tensor, row * width, count * width).reshape(count, width)

    def bias(self, layer: int, module: str) -> Float32 | None:
        """See BaseWeights."""
        tensor = self._tensors.get(f"{_name(layer, module)}.bias")
        return None if tensor is None else _read(tensor, 0, tensor.shape[0])


def _name(layer: int, module: str) -> str:
    path = module_path(layer, module)
    return path if module == "lm_head" else f"model.{path}"


def _read(tensor: TensorBytes, first: int, count: int) -> Float32:
    offset = tensor.offset + first * ITEMSIZE[tensor.dtype]
    values = np.fromfile(tensor.path, STORAGE[tensor.dtype], count, offset=offset)
    return widen(values, tensor.dtype)
