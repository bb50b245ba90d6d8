"""The obvious torch form of segmented LoRA."""

from __future__ import annotations

import torch

from loramux_kernels import dispatch
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import DTYPES, TABLE_SITES, AdapterTable


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    site: str,
) -> None:
    """See :func:`loramux_kernels.lora.add_lora`."""
    dispatch.calls["reference:add_lora"] += 1
    for run in range(len(runs.row_start) - 1):
        rows = slice(int(runs.row_start[run]), int(runs.row_start[run + 1]))
        column = 0
        for module in TABLE_SITES[site]:
            out = int(table.out_width[module])
            delta = torch.zeros(rows.stop - rows.start, out, device=y.device)
            for entry in range(int(runs.entry_start[run]), int(runs.entry_start[run + 1])):
                slot = int(runs.slot[entry])
                a, b = matrices(arena, table, slot, layer, module)
                scale = float(runs.scale[entry]) * float(table.scale[slot, layer, module])
                h = x[rows].float() @ a.T
                if table.middle_offset[slot, layer, module] >= 0:
                    h = h @ middle(arena, table, slot, layer, module).T
                delta += scale * (h @ b)
            columns = slice(column, column + out)
            y[rows, columns] = (y[rows, columns].float() + delta).to(y.dtype)
            column += out


def matrices(
    arena: torch.Tensor, table: AdapterTable, slot: int, layer: int, module: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [rank, out] of one module as fp32 copies."""
    rank = int(table.rank[slot, layer, module])
    in_width, out_width = int(table.in_width[module]), int(table.out_width[module])
    if rank == 0:
        return arena.new_zeros(0, in_width).float(), arena.new_zeros(0, out_width).float()
    return (
        _vectors(arena, table, slot, int(table.a_offset[slot, layer, module]), rank, in_width),
        _vectors(arena, table, slot, int(table.b_offset[slot, layer, module]), rank, out_width),
    )


def middle(
    arena: torch.Tensor, table: AdapterTable, slot: int, layer: int, module: int
) -> torch.Tensor:
    """R [rank, rank] of a module that has a middle, as an fp32 copy."""
    rank = int(table.rank[slot, layer, module])
    offset = int(table.middle_offset[slot, layer, module])
    return _vectors(arena, table, slot, offset, rank, rank)


def _vectors(
    arena: torch.Tensor, table: AdapterTable, slot: int, offset: int, count: int, width: int
) -> torch.Tensor:
    padded = -(-width // table.chunk) * table.chunk
    return stream_of(arena, table, slot, offset, count * padded).view(count, padded)[:, :width]


def stream_of(
    arena: torch.Tensor, table: AdapterTable, slot: int, offset: int, count: int
) -> torch.Tensor:
    """``count`` elements of an adapter's stream from ``offset``, as an fp32 copy; an fp32
    adapter's bits are kept."""
    dtype = DTYPES[int(table.dtype[slot])]
    if count == 0:
        return torch.zeros(0, device=arena.device)
    per_slice = table.slice_bytes // dtype.itemsize
    start = int(table.list_start[slot])
    first, last = offset // per_slice, (offset + count - 1) // per_slice
    pieces = [
        arena[int(at) : int(at) + table.slice_bytes]
        for at in table.slices[start + first : start + last + 1]
    ]
    return torch.cat(pieces).view(dtype)[offset - first * per_slice :][:count].float()
