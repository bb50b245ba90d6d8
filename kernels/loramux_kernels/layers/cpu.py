"""All layers of a decoder in one compiled call: what a CUDA graph is to a GPU.

Between two kernels of a decode step Python needs as long as a kernel: views, checks, the boxing of
forty arguments. Here they are passed once a step, and a layer is a loop's body. The kernels are the
very ones of the other folders, so every bit is that of the operations called one by one.
"""

from __future__ import annotations

from typing import Any

import numba
import torch

from loramux_kernels import dispatch, simd
from loramux_kernels.attention import cpu as attention
from loramux_kernels.attention.pages import Pages
from loramux_kernels.jit import counting, entry
from loramux_kernels.layers.table import LayerTable, Vector, Work
from loramux_kernels.linear import cpu as linear
from loramux_kernels.linear.matrix import DTYPES, PANEL
from loramux_kernels.lora import cpu as lora
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import (
    GAIN,
    INPUT_GAIN,
    SHIFT,
    SITES,
    TABLE_MODULES,
    TABLE_SITES,
    AdapterTable,
)
from loramux_kernels.modulate import cpu as modulation
from loramux_kernels.norm import cpu as norm

_QKV, _O, _GATE_UP, _DOWN = range(len(SITES))
_AFTER_INPUT_NORM = (
    TABLE_MODULES.index("input_layernorm"),
    list(TABLE_SITES).index("input_layernorm"),
)
_AFTER_POST_NORM = (
    TABLE_MODULES.index("post_attention_layernorm"),
    list(TABLE_SITES).index("post_attention_layernorm"),
)
_INPUT_NORM, _POST_NORM, _Q_NORM, _K_NORM, _BIASES = Vector

_add_lora: Any = lora.add_lora_at  # mypy counts no starred operands
_modulate: Any = modulation.modulate_at
_ITEMSIZES = tuple(dtype.itemsize for dtype in DTYPES)


def run_layers(
    work: Work,
    layers: LayerTable,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    arena: torch.Tensor,
    pages: Pages,
    table: AdapterTable,
    runs: Runs,
) -> None:
    """See :func:`loramux_kernels.layers.run_layers`."""
    dispatch.calls["cpu:run_layers"] += 1
    _run_layers(
        work.residual.numpy(),
        work.hidden.numpy(),
        work.normed.numpy(),
        work.qkv.numpy(),
        work.attended.numpy(),
        work.gate_up.numpy(),
        work.inner.numpy(),
        layers.matrices,
        layers.scales,
        layers.dtypes,
        layers.vectors,
        layers.windows,
        layers.eps,
        layers.scale,
        layers.num_heads,
        cos.numpy(),
        sin.numpy(),
        positions.numpy(),
        arena.numpy(),
        pages.offsets,
        pages.request_of_row,
        pages.block_request,
        pages.block_row,
        pages.row_start,
        pages.context,
        pages.path_start,
        pages.path_nodes,
        pages.page_tokens,
        pages.num_kv_heads,
        pages.head_dim,
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
        table.vector_offset,
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
        runs.top_ranks(table),
        runs.middles(table),
        runs.modulated(table),
        numba.get_num_threads(),
    )


@counting
def _project(out: Any, x: Any, address: int, scales: int, dtype: int) -> None:
    panels = (out.shape[1] + PANEL - 1) // PANEL
    data = simd.bytes_at(address, panels * PANEL * x.shape[1] * _ITEMSIZES[dtype])
    linear.project_at(out, x, data, dtype, simd.floats(scales, out.shape[1] if scales else 0))


@counting
def _add_bias(out: Any, address: int) -> None:
    if address == 0:
        return
    bias = simd.floats(address, out.shape[1])
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] += bias[column]


@counting
def _apply(
    values: Any,
    widths: Any,
    gain: int,
    shift: int,
    layer: int,
    first_module: int,
    num_modules: int,
    arena: Any,
    table: Any,
    vector_offset: Any,
    runs: Any,
    threads: int,
) -> None:
    """Each row's own vectors of a site."""
    slices, slice_bytes, list_start = table[0], table[1], table[3]
    where = (slices, slice_bytes, list_start, vector_offset, layer, first_module, num_modules)
    who = (runs[0], runs[1], runs[2], runs[3], runs[8], runs[9], threads)
    _modulate(values, arena, *where, widths, gain, shift, *who)


@counting
def _site(
    out: Any,
    x: Any,
    site: int,
    first_module: int,
    num_modules: int,
    layer: int,
    matrices: Any,
    scales: Any,
    dtypes: Any,
    vectors: Any,
    arena: Any,
    table: Any,
    widths: Any,
    runs: Any,
    vector_offset: Any,
    top_ranks: Any,
    middles: Any,
    modulated: Any,
    threads: int,
) -> None:
    """The base's raw ``W x``, then each row's adapters, then the bias."""
    modules = (layer, first_module, num_modules)
    rest = (arena, table, vector_offset, runs, threads)
    if modulated[layer, site, 1]:
        _apply(x, widths[0], INPUT_GAIN, -1, *modules, *rest)
    _project(out, x, matrices[layer, site], scales[layer, site], dtypes[layer, site])
    if modulated[layer, site, 0]:
        _apply(out, widths[1], GAIN, SHIFT, *modules, *rest)
    if top_ranks[layer, site] > 0:
        _add_lora(
            out,
            x,
            arena,
            *table,
            layer,
            first_module,
            num_modules,
            *widths,
            *runs,
            top_ranks[layer, site],
            middles[layer, site],
            threads,
        )
    _add_bias(out, vectors[layer, _BIASES + site])


@entry(
    "void(float32[:,::1], float32[:,::1], float32[:,::1], float32[:,::1], float32[:,::1],"
    " float32[:,::1], float32[:,::1],"
    " int64[:,::1], int64[:,::1], int64[:,::1], int64[:,::1], int64[::1],"
    " float64, float64, int64,"
    " float32[:,::1], float32[:,::1], int64[::1], uint8[::1],"
    " int64[:,:,::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1],"
    " int32[::1], int32[::1], int64, int64, int64,"
    " int64[::1], int64, int64, int64[::1], int32[::1],"
    " int64[:,:,::1], int64[:,:,::1], int64[:,:,::1], int32[:,:,::1], float32[:,:,::1],"
    " int64[:,:,:,::1],"
    " int64[::1], int64[::1],"
    " int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], int32[::1],"
    " int32[::1], int32[::1], int32[::1], int32[::1], int64[:,::1], boolean[:,::1],"
    " boolean[:,:,::1], int64)"
)
def _run_layers(
    residual: Any,
    hidden: Any,
    normed: Any,
    qkv: Any,
    attended: Any,
    gate_up: Any,
    inner_: Any,
    matrices: Any,
    scales: Any,
    dtypes: Any,
    vectors: Any,
    windows: Any,
    eps: float,
    scale: float,
    heads: int,
    cos: Any,
    sin: Any,
    positions: Any,
    arena: Any,
    offsets: Any,
    request_of_row: Any,
    block_request: Any,
    block_row: Any,
    page_row_start: Any,
    context: Any,
    path_start: Any,
    path_nodes: Any,
    page_tokens: int,
    kv_heads: int,
    dim: int,
    slices: Any,
    slice_bytes: int,
    chunk: int,
    list_start: Any,
    adapter_dtype: Any,
    a_offset: Any,
    b_offset: Any,
    middle_offset: Any,
    rank: Any,
    adapter_scale: Any,
    vector_offset: Any,
    in_width: Any,
    out_width: Any,
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
    top_ranks: Any,
    middles: Any,
    modulated: Any,
    threads: int,
) -> None:
    width = hidden.shape[1]
    table = (
        slices,
        slice_bytes,
        chunk,
        list_start,
        adapter_dtype,
        a_offset,
        b_offset,
        middle_offset,
        rank,
        adapter_scale,
    )
    widths = (in_width, out_width)
    runs = (
        row_start,
        entry_start,
        slot,
        request_scale,
        run_of_entry,
        pair_start,
        entry_block,
        entry_block_row,
        run_block,
        run_block_row,
    )
    adapters = (arena, table, widths, runs, vector_offset, top_ranks, middles, modulated, threads)
    rest = (matrices, scales, dtypes, vectors, *adapters)
    beside = (arena, table, vector_offset, runs, threads)
    for layer in range(len(windows)):
        input_norm = simd.floats(vectors[layer, _INPUT_NORM], width)
        norm.add_rms_norm_rows(normed, residual, hidden, input_norm, eps)
        module, site = _AFTER_INPUT_NORM
        if modulated[layer, site, 0]:
            _apply(normed, out_width, GAIN, SHIFT, layer, module, 1, *beside)
        _site(qkv, normed, _QKV, 0, 3, layer, *rest)
        if vectors[layer, _Q_NORM] != 0:
            q_norm = simd.floats(vectors[layer, _Q_NORM], dim)
            k_norm = simd.floats(vectors[layer, _K_NORM], dim)
            norm.head_rms_norm_rows(qkv, q_norm, k_norm, heads, kv_heads, dim, eps)
        attention.rope_store_rows(
            qkv,
            cos,
            sin,
            positions,
            arena,
            offsets,
            layer,
            request_of_row,
            page_row_start,
            context,
            page_tokens,
            kv_heads,
            dim,
            heads,
        )
        attention.paged_attention_rows(
            attended,
            qkv,
            arena,
            offsets,
            layer,
            block_request,
            block_row,
            page_row_start,
            context,
            path_start,
            path_nodes,
            page_tokens,
            kv_heads,
            dim,
            heads,
            scale,
            windows[layer],
            threads,
        )
        _site(hidden, attended, _O, 3, 1, layer, *rest)
        post_norm = simd.floats(vectors[layer, _POST_NORM], width)
        norm.add_rms_norm_rows(normed, residual, hidden, post_norm, eps)
        module, site = _AFTER_POST_NORM
        if modulated[layer, site, 0]:
            _apply(normed, out_width, GAIN, SHIFT, layer, module, 1, *beside)
        _site(gate_up, normed, _GATE_UP, 4, 2, layer, *rest)
        norm.silu_mul_rows(inner_, gate_up)
        _site(hidden, inner_, _DOWN, 6, 1, layer, *rest)
