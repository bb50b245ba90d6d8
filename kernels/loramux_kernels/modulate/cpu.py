"""Gains and shifts on the CPU: the sums of a run's entries are made once for a block of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import prange

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import inner, parallel
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.shrink import place_of
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
    """See :func:`loramux_kernels.modulate.reference.modulate`."""
    dispatch.calls["cpu:modulate"] += 1
    modulate_at(
        y.numpy(),
        arena.numpy(),
        table.slices,
        table.slice_bytes,
        table.list_start,
        table.vector_offset,
        layer,
        modules[0],
        len(modules),
        widths,
        *kinds,
        runs.row_start,
        runs.entry_start,
        runs.slot,
        runs.scale,
        runs.run_block,
        runs.run_block_row,
        numba.get_num_threads(),
    )


@inner
def _has_any(
    offsets: Any, slot: Any, first: int, last: int, layer: int, module: int, gain: int, shift: int
) -> bool:
    for entry in range(first, last):
        at = offsets[slot[entry], layer, module]
        if at[gain] >= 0 or (shift >= 0 and at[shift] >= 0):
            return True
    return False


@inner
def _modulate_items(
    thread: int,
    threads: int,
    y: Any,
    row_width: int,
    pool: Any,
    slices: Any,
    per_slice: int,
    list_start: Any,
    offsets: Any,
    layer: int,
    first_module: int,
    modules: int,
    widths: Any,
    gain: int,
    shift: int,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    scale: Any,
    run_block: Any,
    run_block_row: Any,
) -> None:
    """Every ``threads``-th item: a block of one run's rows, a module."""
    blocks = len(run_block)
    for item in range(thread, blocks * modules, threads):
        block, module = item % blocks, first_module + item // blocks
        run, row = run_block[block], run_block_row[block]
        rows = min(ROW_BLOCK, row_start[run + 1] - row)
        first, last = entry_start[run], entry_start[run + 1]
        if not _has_any(offsets, slot, first, last, layer, module, gain, shift):
            continue  # times one and plus zero would change a zero's sign
        before = 0
        for other in range(first_module, module):
            before += widths[other]
        for column in range(0, widths[module], 16):
            left = min(16, widths[module] - column)
            factor, added = simd.splat(np.float32(1)), simd.splat(np.float32(0))
            for entry in range(first, last):
                adapter = slot[entry]
                c = simd.splat(scale[entry])
                at = offsets[adapter, layer, module, gain]
                if at >= 0:
                    # Chunks of sixteen or more never cross a slice's end.
                    v = simd.load(
                        pool, place_of(slices, list_start[adapter], per_slice, 4, at + column)
                    )
                    factor = simd.fma(c, v, factor)
                if shift < 0:
                    continue
                at = offsets[adapter, layer, module, shift]
                if at >= 0:
                    v = simd.load(
                        pool, place_of(slices, list_start[adapter], per_slice, 4, at + column)
                    )
                    added = simd.fma(c, v, added)
            for r in range(row, row + rows):
                to = r * row_width + before + column
                v = simd.fma(simd.load_part(y, to, left), factor, added)
                simd.store_part(y, to, v, left)


@parallel(
    "void(float32[:,::1], uint8[::1], int64[::1], int64, int64[::1], int64[:,:,:,::1],"
    " int64, int64, int64, int64[::1], int64, int64,"
    " int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], int32[::1], int64)"
)
def modulate_at(
    y: Any,
    arena: Any,
    slices: Any,
    slice_bytes: int,
    list_start: Any,
    offsets: Any,
    layer: int,
    first_module: int,
    modules: int,
    widths: Any,
    gain: int,
    shift: int,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    scale: Any,
    run_block: Any,
    run_block_row: Any,
    threads: int,
) -> None:
    row_width = y.shape[1]
    y, pool = y.reshape(-1), arena.view(np.float32)
    for thread in prange(threads):
        _modulate_items(
            thread,
            threads,
            y,
            row_width,
            pool,
            slices,
            slice_bytes // 4,
            list_start,
            offsets,
            layer,
            first_module,
            modules,
            widths,
            gain,
            shift,
            row_start,
            entry_start,
            slot,
            scale,
            run_block,
            run_block_row,
        )
