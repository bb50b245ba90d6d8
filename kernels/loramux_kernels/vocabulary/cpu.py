"""Changes to single tokens on the CPU. Both are rare, so they are written for few bytes, not speed:
what is not changed is not touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from loramux_kernels import dispatch, simd
from loramux_kernels.jit import inner, parallel
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.shrink import place_of
from loramux_kernels.lora.table import EMBEDDING, HEAD, TABLE_MODULES, AdapterTable

_EMBED = TABLE_MODULES.index("embed_tokens")
ID_PARTS = 8
"""Pieces of the vocabulary that threads take in turn; no two write the same logit."""


def change_embeddings(
    y: torch.Tensor,
    token_ids: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
) -> None:
    """See :func:`loramux_kernels.vocabulary.change_embeddings`."""
    dispatch.calls["cpu:change_embeddings"] += 1
    change_embeddings_at(
        y.numpy(),
        token_ids.numpy(),
        arena.numpy(),
        table.slices,
        table.slice_bytes,
        table.chunk,
        table.list_start,
        table.dtype,
        table.a_offset,
        table.b_offset,
        table.rank,
        table.scale,
        int(table.in_width[_EMBED]),
        table.token_ids_offset,
        table.token_rows_offset,
        table.num_token_rows,
        runs.row_start,
        runs.entry_start,
        runs.slot,
        runs.scale,
    )


def change_logits(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, table: AdapterTable, runs: Runs
) -> None:
    """See :func:`loramux_kernels.vocabulary.change_logits`."""
    dispatch.calls["cpu:change_logits"] += 1
    change_logits_at(
        y.numpy(),
        x.numpy(),
        arena.numpy(),
        table.slices,
        table.slice_bytes,
        table.chunk,
        table.list_start,
        table.token_ids_offset,
        table.token_rows_offset,
        table.num_token_rows,
        runs.row_start,
        runs.entry_start,
        runs.slot,
        runs.scale,
        runs.run_block,
        runs.run_block_row,
    )


@inner
def _first_from(
    pool: Any, slices: Any, list_at: int, per_slice: int, ids: int, count: int, wanted: int
) -> int:
    """How many of the increasing ids at ``ids`` are smaller than ``wanted``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if pool[place_of(slices, list_at, per_slice, 4, ids + middle)] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@inner
def _lane_f32(w: Any, at: int, scratch: Any, to: int) -> Any:
    return w[at]


@inner
def _lane_f16(w: Any, at: int, scratch: Any, to: int) -> Any:
    simd.store(scratch, to, simd.load_f16(w, at - at % 16))
    return scratch[to + at % 16]


@inner
def _lane_bf16(w: Any, at: int, scratch: Any, to: int) -> Any:
    simd.store(scratch, to, simd.load_bf16(w, at - at % 16))
    return scratch[to + at % 16]


def _embed_with(load: Any, lane: Any, itemsize: int) -> Any:
    @inner
    def embed(
        w: Any,
        per_slice: int,
        slices: Any,
        list_at: int,
        a: int,
        a_padded: int,
        b: int,
        b_padded: int,
        rank: int,
        token: int,
        factor: Any,
        y: Any,
        to: int,
        width: int,
        scratch: Any,
        scratch_at: int,
    ) -> None:
        """``y += factor * B A[:, token]``, vector by vector."""
        for j in range(rank):
            at = place_of(slices, list_at, per_slice, itemsize, a + j * a_padded + token)
            h = simd.splat(factor * lane(w, at, scratch, scratch_at))
            for k in range(0, width, 16):
                left = min(16, width - k)
                at = place_of(slices, list_at, per_slice, itemsize, b + j * b_padded + k)
                v = simd.fma(h, load(w, at), simd.load_part(y, to + k, left))
                simd.store_part(y, to + k, v, left)

    return embed


_embed_f32 = _embed_with(simd.load, _lane_f32, 4)
_embed_f16 = _embed_with(simd.load_f16, _lane_f16, 2)
_embed_bf16 = _embed_with(simd.load_bf16, _lane_bf16, 2)


@inner
def _change_row(
    row: int,
    run: int,
    y: Any,
    token: int,
    f32: Any,
    u16: Any,
    i32: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    a_offset: Any,
    b_offset: Any,
    rank: Any,
    scale: Any,
    vocabulary: int,
    ids_offset: Any,
    rows_offset: Any,
    num_rows: Any,
    entry_start: Any,
    slot: Any,
    request_scale: Any,
    width: int,
    scratch: Any,
) -> None:
    a_padded = (vocabulary + chunk - 1) // chunk * chunk
    padded = (width + chunk - 1) // chunk * chunk
    for entry in range(entry_start[run], entry_start[run + 1]):
        adapter, c = slot[entry], request_scale[entry]
        list_at = list_start[adapter]
        args = (
            slices,
            list_at,
            a_offset[adapter, 0, _EMBED],
            a_padded,
            b_offset[adapter, 0, _EMBED],
            padded,
            rank[adapter, 0, _EMBED],
            token,
            c * scale[adapter, 0, _EMBED],
            y,
            row * width,
            width,
            scratch,
            row * 16,
        )
        if dtype[adapter] == 0:
            _embed_f32(f32, slice_bytes // 4, *args)
        elif dtype[adapter] == 1:
            _embed_f16(u16, slice_bytes // 2, *args)
        else:
            _embed_bf16(u16, slice_bytes // 2, *args)
        count = num_rows[adapter, EMBEDDING]
        if count == 0:
            continue
        ids, per_slice = ids_offset[adapter, EMBEDDING], slice_bytes // 4
        index = _first_from(i32, slices, list_at, per_slice, ids, count, token)
        if index < count and i32[place_of(slices, list_at, per_slice, 4, ids + index)] == token:
            start = rows_offset[adapter, EMBEDDING] + index * padded
            factor = simd.splat(c)
            for k in range(0, width, 16):
                left, to = min(16, width - k), row * width + k
                v = simd.load(f32, place_of(slices, list_at, per_slice, 4, start + k))
                v = simd.fma(factor, v, simd.load_part(y, to, left))
                simd.store_part(y, to, v, left)


@parallel(
    "void(float32[:,::1], int64[::1], uint8[::1], int64[::1], int64, int64, int64[::1], int32[::1],"
    " int64[:,:,::1], int64[:,:,::1], int32[:,:,::1], float32[:,:,::1], int64,"
    " int64[:,::1], int64[:,::1], int32[:,::1],"
    " int32[::1], int32[::1], int32[::1], float32[::1])"
)
def change_embeddings_at(
    y: Any,
    token_ids: Any,
    arena: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    dtype: Any,
    a_offset: Any,
    b_offset: Any,
    rank: Any,
    scale: Any,
    vocabulary: int,
    ids_offset: Any,
    rows_offset: Any,
    num_rows: Any,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    request_scale: Any,
) -> None:
    f32, u16, i32 = arena.view(np.float32), arena.view(np.uint16), arena.view(np.int32)
    width = y.shape[1]
    y = y.reshape(-1)
    scratch = np.empty(row_start[-1] * 16, dtype=np.float32)
    for row in prange(row_start[-1]):
        run = np.searchsorted(row_start, row, side="right") - 1
        _change_row(
            row,
            run,
            y,
            token_ids[row],
            f32,
            u16,
            i32,
            slices,
            slice_bytes,
            chunk,
            list_start,
            dtype,
            a_offset,
            b_offset,
            rank,
            scale,
            vocabulary,
            ids_offset,
            rows_offset,
            num_rows,
            entry_start,
            slot,
            request_scale,
            width,
            scratch,
        )


@inner
def _change_part(
    run: int,
    row: int,
    rows: int,
    first_id: int,
    last_id: int,
    y: Any,
    vocabulary: int,
    x: Any,
    width: int,
    f32: Any,
    i32: Any,
    slices: Any,
    per_slice: int,
    chunk: int,
    list_start: Any,
    ids_offset: Any,
    rows_offset: Any,
    num_rows: Any,
    entry_start: Any,
    slot: Any,
    scale: Any,
) -> None:
    """The logits from ``first_id`` to before ``last_id`` of some rows of one run."""
    padded = (width + chunk - 1) // chunk * chunk
    for entry in range(entry_start[run], entry_start[run + 1]):
        adapter = slot[entry]
        list_at = list_start[adapter]
        ids, count = ids_offset[adapter, HEAD], num_rows[adapter, HEAD]
        index = _first_from(i32, slices, list_at, per_slice, ids, count, first_id)
        while index < count:
            token = i32[place_of(slices, list_at, per_slice, 4, ids + index)]
            if token >= last_id:
                break
            start = rows_offset[adapter, HEAD] + index * padded
            for r in range(row, row + rows):
                sums = simd.splat(np.float32(0))
                for k in range(0, width, 16):
                    v = simd.load(f32, place_of(slices, list_at, per_slice, 4, start + k))
                    sums = simd.fma(v, simd.load_part(x, r * width + k, min(16, width - k)), sums)
                y[r * vocabulary + token] += scale[entry] * simd.total(sums)
            index += 1


@parallel(
    "void(float32[:,::1], float32[:,::1], uint8[::1], int64[::1], int64, int64, int64[::1],"
    " int64[:,::1], int64[:,::1], int32[:,::1],"
    " int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], int32[::1])"
)
def change_logits_at(
    y: Any,
    x: Any,
    arena: Any,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    ids_offset: Any,
    rows_offset: Any,
    num_rows: Any,
    row_start: Any,
    entry_start: Any,
    slot: Any,
    scale: Any,
    run_block: Any,
    run_block_row: Any,
) -> None:
    f32, i32 = arena.view(np.float32), arena.view(np.int32)
    vocabulary, width = y.shape[1], x.shape[1]
    x, y = x.reshape(-1), y.reshape(-1)
    size = (vocabulary + ID_PARTS - 1) // ID_PARTS
    for item in prange(len(run_block) * ID_PARTS):
        block, part = item // ID_PARTS, item % ID_PARTS
        run, row = run_block[block], run_block_row[block]
        _change_part(
            run,
            row,
            min(ROW_BLOCK, row_start[run + 1] - row),
            part * size,
            min(vocabulary, (part + 1) * size),
            y,
            vocabulary,
            x,
            width,
            f32,
            i32,
            slices,
            slice_bytes // 4,
            chunk,
            list_start,
            ids_offset,
            rows_offset,
            num_rows,
            entry_start,
            slot,
            scale,
        )
