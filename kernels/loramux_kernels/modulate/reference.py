"""The obvious torch form of gains and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels import dispatch
from loramux_kernels.lora.reference import stream_of
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import AdapterTable


def modulate(
    y: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    modules: Sequence[int],
    widths: npt.NDArray[np.int64],
    kinds: tuple[int, int],
) -> None:
    """``y *= 1 + sum of kinds[0]``, then ``y += sum of kinds[1]`` (-1: none); see the package."""
    dispatch.calls["reference:modulate"] += 1
    for run in range(len(runs.row_start) - 1):
        rows = slice(int(runs.row_start[run]), int(runs.row_start[run + 1]))
        entries = range(int(runs.entry_start[run]), int(runs.entry_start[run + 1]))
        column = 0
        for module in modules:
            columns = slice(column, column + int(widths[module]))
            column = columns.stop
            gains, shifts = (
                [
                    float(runs.scale[entry]) * vector
                    for entry in entries
                    if kind >= 0
                    and (vector := _vector(arena, table, runs, entry, layer, module, kind))
                    is not None
                ]
                for kind in kinds
            )
            if gains or shifts:
                values = y[rows, columns].float() * (1 + sum(gains)) + sum(shifts)
                y[rows, columns] = values.to(y.dtype)


def _vector(
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    entry: int,
    layer: int,
    module: int,
    kind: int,
) -> torch.Tensor | None:
    slot = int(runs.slot[entry])
    offset = int(table.vector_offset[slot, layer, module, kind])
    if offset < 0:
        return None
    width = int((table.out_width, table.out_width, table.in_width)[kind][module])
    return stream_of(arena, table, slot, offset, width)
