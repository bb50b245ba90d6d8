"""Segmented LoRA on the CPU: two parallel loops in one call, weights widened in registers; a third
between them, for middles, only where an adapter of the batch has one.

A work item is a block of rows of one entry, so that many rows read a weight once from memory,
times a tile of ranks (shrink) or of columns (expand), so that one large run fills all threads.
Threads take items in turn. No two items write the same element, and the order of every sum is
that of the stream: neither blocks nor threads show in a row's bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import prange

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import inner, parallel
from loramux_kernels.lora.expand import expand_with
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.shrink import shrink_with
from loramux_kernels.lora.table import TABLE_SITES, AdapterTable

RANK_TILE = 16
COLUMN_TILE = 512


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
    dispatch.calls["cpu:add_lora"] += 1
    modules = TABLE_SITES[site]
    add_lora_at(
        y.numpy(),
        x.numpy(),
        arena.numpy(),
        table.slices,
        table.slice_bytes,
        table.chunk,
        table.list_start,
        table.dtype,
        table.a_offset,
        table.b_offset,
        table.middle_offset,
        table.rank,
        table.scale,
        layer,
        modules[0],
        len(modules),
        table.in_width,
        table.out_width,
        runs.row_start,
        runs.entry_start,
        runs.slot,
        runs.scale,
        runs.run_of_entry,
        runs.pair_start,
        runs.entry_block,
        runs.entry_block_row,
        runs.run_block,
        runs.run_block_row,
        runs.top_rank(table, layer, site),
        runs.has_middle(table, layer, site),
        numba.get_num_threads(),
    )


_shrink_f32, _expand_f32 = shrink_with(simd.load, 4), expand_with(simd.load, 4)
_shrink_f16, _expand_f16 = shrink_with(simd.load_f16, 2), expand_with(simd.load_f16, 2)
_shrink_bf16, _expand_bf16 = shrink_with(simd.load_bf16, 2), expand_with(simd.load_bf16, 2)


@inner
def _shrink_items(
    thread: int,
    threads: int,
    f32: Any,
    u16: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    a_offset: Any,
    rank: Any,
    scale: Any,
    layer: int,
    first_module: int,
    modules: int,
    in_width: int,
    row_start: Any,
    slot: Any,
    request_scale: Any,
    run_of_entry: Any,
    pair_start: Any,
    entry_block: Any,
    entry_block_row: Any,
    rank_tiles: int,
    x: Any,
    h: Any,
) -> None:
    """Every ``threads``-th item: a block of one entry's rows, a module, a tile of ranks."""
    in_padded = (in_width + chunk - 1) // chunk * chunk
    pitch = rank_tiles * RANK_TILE
    blocks = len(entry_block)
    for item in range(thread, blocks * modules * rank_tiles, threads):
        block = item % blocks
        which = item // blocks % modules
        module = first_module + which
        first = item // (blocks * modules) * RANK_TILE
        entry = entry_block[block]
        adapter = slot[entry]
        vectors = min(RANK_TILE, rank[adapter, layer, module] - first)
        if vectors <= 0:
            continue
        run = run_of_entry[entry]
        row = entry_block_row[block]
        rows = min(ROW_BLOCK, row_start[run + 1] - row)
        pair = pair_start[entry] + row - row_start[run]
        args = (
            slices,
            list_start[adapter],
            a_offset[adapter, layer, module] + first * in_padded,
            in_padded,
            vectors,
            x,
            row * in_width,
            in_width,
            in_width,
            rows,
            h,
            (pair * modules + which) * pitch + first,
            modules * pitch,
            request_scale[entry] * scale[adapter, layer, module],
        )
        if dtype[adapter] == 0:
            _shrink_f32(f32, slice_bytes // 4, *args)
        elif dtype[adapter] == 1:
            _shrink_f16(u16, slice_bytes // 2, *args)
        else:
            _shrink_bf16(u16, slice_bytes // 2, *args)


@inner
def _middle_items(
    thread: int,
    threads: int,
    f32: Any,
    u16: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    middle_offset: Any,
    rank: Any,
    layer: int,
    first_module: int,
    modules: int,
    row_start: Any,
    slot: Any,
    run_of_entry: Any,
    pair_start: Any,
    entry_block: Any,
    entry_block_row: Any,
    rank_tiles: int,
    h: Any,
    m: Any,
) -> None:
    """Items as those of the shrink, whose ``h`` it reads: ``m = R h``, or ``h`` again where an
    entry has no middle."""
    pitch = rank_tiles * RANK_TILE
    blocks = len(entry_block)
    for item in range(thread, blocks * modules * rank_tiles, threads):
        block = item % blocks
        which = item // blocks % modules
        module = first_module + which
        first = item // (blocks * modules) * RANK_TILE
        entry = entry_block[block]
        adapter = slot[entry]
        width = rank[adapter, layer, module]
        vectors = min(RANK_TILE, width - first)
        if vectors <= 0:
            continue
        run = run_of_entry[entry]
        row = entry_block_row[block]
        rows = min(ROW_BLOCK, row_start[run + 1] - row)
        at = ((pair_start[entry] + row - row_start[run]) * modules + which) * pitch
        stride = modules * pitch
        if middle_offset[adapter, layer, module] < 0:
            for start in range(at + first, at + first + rows * stride, stride):
                for j in range(start, start + vectors):
                    m[j] = h[j]
            continue
        padded = (width + chunk - 1) // chunk * chunk
        args = (
            slices,
            list_start[adapter],
            middle_offset[adapter, layer, module] + first * padded,
            padded,
            vectors,
            h,
            at,
            stride,
            width,
            rows,
            m,
            at + first,
            stride,
            np.float32(1),
        )
        if dtype[adapter] == 0:
            _shrink_f32(f32, slice_bytes // 4, *args)
        elif dtype[adapter] == 1:
            _shrink_f16(u16, slice_bytes // 2, *args)
        else:
            _shrink_bf16(u16, slice_bytes // 2, *args)


@inner
def _expand_items(
    thread: int,
    threads: int,
    f32: Any,
    u16: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    b_offset: Any,
    rank: Any,
    layer: int,
    first_module: int,
    modules: int,
    out_widths: Any,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    pair_start: Any,
    run_block: Any,
    run_block_row: Any,
    rank_tiles: int,
    y: Any,
    row_width: int,
    h: Any,
) -> None:
    """Every ``threads``-th item: a block of one run's rows, a module, a tile of columns."""
    pitch = rank_tiles * RANK_TILE
    blocks = len(run_block)
    widest = 0
    for module in range(first_module, first_module + modules):
        widest = max(widest, out_widths[module])
    column_tiles = (widest + COLUMN_TILE - 1) // COLUMN_TILE
    for item in range(thread, blocks * modules * column_tiles, threads):
        block = item % blocks
        which = item // blocks % modules
        module = first_module + which
        run = run_block[block]
        row = run_block_row[block]
        rows = min(ROW_BLOCK, row_start[run + 1] - row)
        # A lone row reads whole vectors, as one stream; many rows of y stay in the cache.
        tile = widest if rows == 1 and blocks >= threads else COLUMN_TILE
        column = item // (blocks * modules) * tile
        out_width = out_widths[module]
        columns = min(tile, out_width - column)
        if columns <= 0:
            continue
        before = 0
        for other in range(first_module, module):
            before += out_widths[other]
        out_padded = (out_width + chunk - 1) // chunk * chunk
        for entry in range(entry_start[run], entry_start[run + 1]):
            adapter = slot[entry]
            pair = pair_start[entry] + row - row_start[run]
            args = (
                slices,
                list_start[adapter],
                b_offset[adapter, layer, module] + column,
                out_padded,
                rank[adapter, layer, module],
                y,
                row * row_width + before + column,
                row_width,
                columns,
                rows,
                h,
                (pair * modules + which) * pitch,
                modules * pitch,
            )
            if dtype[adapter] == 0:
                _expand_f32(f32, slice_bytes // 4, *args)
            elif dtype[adapter] == 1:
                _expand_f16(u16, slice_bytes // 2, *args)
            else:
                _expand_bf16(u16, slice_bytes // 2, *args)


@parallel(
    "void(float32[:,::1], float32[:,::1], uint8[::1],"
    " int64[::1], int64, int64, int64[::1], int32[::1],"
    " int64[:,:,::1], int64[:,:,::1], int64[:,:,::1], int32[:,:,::1], float32[:,:,::1],"
    " int64, int64, int64, int64[::1], int64[::1],"
    " int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], int32[::1],"
    " int32[::1], int32[::1], int32[::1], int32[::1], int64, boolean, int64)"
)
def add_lora_at(
    y: Any,
    x: Any,
    arena: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    a_offset: Any,
    b_offset: Any,
    middle_offset: Any,
    rank: Any,
    scale: Any,
    layer: int,
    first_module: int,
    modules: int,
    in_widths: Any,
    out_widths: Any,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    request_scale: Any,
    run_of_entry: Any,
    pair_start: Any,
    entry_block: Any,
    entry_block_row: Any,
    run_block: Any,
    run_block_row: Any,
    top_rank: int,
    middles: bool,
    threads: int,
) -> None:
    f32, u16 = arena.view(np.float32), arena.view(np.uint16)
    x, y, row_width = x.reshape(-1), y.reshape(-1), y.shape[1]
    in_width = in_widths[first_module]
    rank_tiles = (top_rank + RANK_TILE - 1) // RANK_TILE
    # h[pair, module, rank]: one small vector per (row, entry).
    h = np.empty(pair_start[-1] * modules * rank_tiles * RANK_TILE, dtype=np.float32)
    for thread in prange(threads):
        _shrink_items(
            thread,
            threads,
            f32,
            u16,
            slices,
            slice_bytes,
            chunk,
            list_start,
            dtype,
            a_offset,
            rank,
            scale,
            layer,
            first_module,
            modules,
            in_width,
            row_start,
            slot,
            request_scale,
            run_of_entry,
            pair_start,
            entry_block,
            entry_block_row,
            rank_tiles,
            x,
            h,
        )
    m = h
    if middles:
        m = np.empty_like(h)
        for thread in prange(threads):
            _middle_items(
                thread,
                threads,
                f32,
                u16,
                slices,
                slice_bytes,
                chunk,
                list_start,
                dtype,
                middle_offset,
                rank,
                layer,
                first_module,
                modules,
                row_start,
                slot,
                run_of_entry,
                pair_start,
                entry_block,
                entry_block_row,
                rank_tiles,
                h,
                m,
            )
    for thread in prange(threads):
        _expand_items(
            thread,
            threads,
            f32,
            u16,
            slices,
            slice_bytes,
            chunk,
            list_start,
            dtype,
            b_offset,
            rank,
            layer,
            first_module,
            modules,
            out_widths,
            row_start,
            entry_start,
            slot,
            pair_start,
            run_block,
            run_block_row,
            rank_tiles,
            y,
            row_width,
            m,
        )
