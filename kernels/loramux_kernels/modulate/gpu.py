"""Gains and shifts in Triton: a program per (block of a run's rows, chunk of columns)."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch
from loramux_kernels.lora.gpu import on_device
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import TABLE_MODULES, VECTORS, AdapterTable
from loramux_kernels.tuning import Launch

LAUNCH = Launch(warps=1, stages=1)
"""A chunk is at most 128 elements: four for each thread of one warp."""


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
    """See :func:`loramux_kernels.modulate.reference.modulate`."""
    work, step = on_device(runs, table, y.device)
    where = table.tensors
    column = 0
    for module in modules:
        width = int(widths[module])
        for name in ("expand_rows", "expand_tiles"):
            items = len(work.arrays[name])
            if not items:
                continue
            dispatch.calls["gpu:modulate"] += 1
            modulate_kernel[(items, -(-width // table.chunk))](
                y,
                arena,
                where["slices"],
                where["list_start"],
                where["vector_offset"],
                step["lora_entry_start"],
                step["lora_slot"],
                step["lora_scale"],
                step[name],
                layer,
                LAYERS=table.num_layers,
                MODULES=len(TABLE_MODULES),
                KINDS=len(VECTORS),
                MODULE=module,
                GAIN=kinds[0],
                SHIFT=kinds[1],
                ROW_WIDTH=y.shape[1],
                FIRST_COLUMN=column,
                WIDTH=width,
                SLICE_BYTES=table.slice_bytes,
                CHUNK=table.chunk,
                **LAUNCH.options,
            )
        column += width


@triton.jit
def _chunk(arena, slices, offset, tile, SLICE_BYTES: tl.constexpr, CHUNK: tl.constexpr):
    """The ``tile``-th chunk of the fp32 vector at ``offset``."""
    PER_SLICE: tl.constexpr = SLICE_BYTES // 4
    element = offset + tile * CHUNK
    # A chunk lies within one slice.
    at = tl.load(slices + element // PER_SLICE) // 4 + element % PER_SLICE
    pool = arena.to(tl.pointer_type(tl.float32))
    return tl.load(pool + at + tl.arange(0, CHUNK))


@triton.jit
def modulate_kernel(
    y,
    arena,
    slices,
    list_start,
    vector_offset,
    entry_start,
    slot,
    scale,
    items,
    layer,
    LAYERS: tl.constexpr,
    MODULES: tl.constexpr,
    KINDS: tl.constexpr,
    MODULE: tl.constexpr,
    GAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows ``items[program 0]`` (run, first row, rows, 0), columns of chunk ``program 1``."""
    item, tile = tl.program_id(0), tl.program_id(1)
    run = tl.load(items + 4 * item)
    row = tl.load(items + 4 * item + 1).to(tl.int64)
    rows = tl.load(items + 4 * item + 2)
    factor = tl.full([CHUNK], 1, tl.float32)
    added = tl.zeros([CHUNK], tl.float32)
    found = 0
    for entry in range(tl.load(entry_start + run), tl.load(entry_start + run + 1)):
        adapter = tl.load(slot + entry)
        c = tl.load(scale + entry)
        stream = slices + tl.load(list_start + adapter)
        place = ((adapter.to(tl.int64) * LAYERS + layer) * MODULES + MODULE) * KINDS
        offset = tl.load(vector_offset + place + GAIN)
        if offset >= 0:
            factor += c * _chunk(arena, stream, offset, tile, SLICE_BYTES, CHUNK)
            found += 1
        if SHIFT >= 0:
            offset = tl.load(vector_offset + place + SHIFT)
            if offset >= 0:
                added += c * _chunk(arena, stream, offset, tile, SLICE_BYTES, CHUNK)
                found += 1
    if found > 0:
        columns = tile * CHUNK + tl.arange(0, CHUNK)
        for r in range(rows):
            to = y + (row + r) * ROW_WIDTH + FIRST_COLUMN + columns
            values = tl.load(to, mask=columns < WIDTH, other=0).to(tl.float32)
            values = values * factor + added
            tl.store(to, values.to(y.dtype.element_ty), mask=columns < WIDTH)
