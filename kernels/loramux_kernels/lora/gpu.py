"""Segmented LoRA in Triton: one shrink and one expand launch for a site, whatever the adapters.

Everything is widened to fp32 on load and narrowed on store. Half-precision values fit TF32's
mantissa, so the tensor cores multiply them exactly; anything wider takes three TF32 products.
"""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_kernels import dispatch
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.table import SITES, AdapterTable

RANK_TILE = 16


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
    modules = SITES[site]
    where = table.tensors
    step = runs.tensors(y.device)
    rank_tiles = -(-runs.top_rank(table, layer, site) // RANK_TILE)
    in_width, row_width = table.site_widths[site]
    widest = max(int(table.out_width[m]) for m in modules)
    # h[pair, module, rank]: one small vector per (row, entry).
    pitch = rank_tiles * RANK_TILE
    h = torch.empty(
        (int(runs.pair_start[-1]), len(modules), pitch), dtype=torch.float32, device=y.device
    )
    common = {
        "LAYERS": table.num_layers,
        "FIRST_MODULE": modules[0],
        "MODULES": len(modules),
        "SLICE_BYTES": table.slice_bytes,
        "CHUNK": table.chunk,
        "ROWS": ROW_BLOCK,
        "RANKS": RANK_TILE,
    }
    dispatch.calls["gpu:shrink"] += 1
    shrink_kernel[(len(runs.entry_block), len(modules), rank_tiles)](
        h,
        x,
        arena,
        where["slices"],
        where["list_start"],
        where["dtype"],
        where["a_offset"],
        where["rank"],
        where["scale"],
        step["row_start"],
        step["slot"],
        step["scale"],
        step["run_of_entry"],
        step["pair_start"],
        step["entry_block"],
        step["entry_block_row"],
        layer,
        pitch,
        WIDTH=in_width,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        **common,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )
    dispatch.calls["gpu:expand"] += 1
    expand_kernel[(len(runs.run_block), len(modules), -(-widest // table.chunk))](
        y,
        h,
        arena,
        where["slices"],
        where["list_start"],
        where["dtype"],
        where["b_offset"],
        where["rank"],
        where["out_width"],
        step["row_start"],
        step["entry_start"],
        step["slot"],
        step["pair_start"],
        step["run_block"],
        step["run_block_row"],
        layer,
        pitch,
        ROW_WIDTH=row_width,
        **common,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )


@triton.jit
def _vectors(
    arena,
    slices,
    element,
    known,
    DTYPE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of each vector whose next element is ``element[i]``, as fp32 [vectors, CHUNK]."""
    ITEMSIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    PER_SLICE: tl.constexpr = SLICE_BYTES // ITEMSIZE
    pool = arena.to(tl.pointer_type(DTYPE))
    start = tl.load(slices + element // PER_SLICE, mask=known, other=0)
    # A chunk lies within one slice, and slices are aligned to chunks.
    at = tl.multiple_of(start // ITEMSIZE + element % PER_SLICE, CHUNK)
    lanes = tl.arange(0, CHUNK)
    return tl.load(pool + at[:, None] + lanes[None, :], mask=known[:, None], other=0).to(tl.float32)


@triton.jit
def _project(
    x,
    real,
    arena,
    slices,
    element,
    known,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x A^T`` [ROWS, RANKS] for rows at the pointers ``x`` and the vectors from ``element``."""
    lanes = tl.arange(0, CHUNK)
    acc = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for k in range(0, WIDTH, CHUNK):
        a = _vectors(arena, slices, element + k, known, DTYPE, SLICE_BYTES, CHUNK)
        inside = real[:, None] & (k + lanes < WIDTH)[None, :]
        rows = tl.load(x[:, None] + k + lanes[None, :], mask=inside, other=0).to(tl.float32)
        acc = tl.dot(rows, tl.trans(a), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["layer", "pitch"])
def shrink_kernel(
    h,
    x,
    arena,
    slices,
    list_start,
    dtype,
    a_offset,
    rank,
    scale,
    row_start,
    slot,
    request_scale,
    run_of_entry,
    pair_start,
    entry_block,
    entry_block_row,
    layer,
    pitch,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``h[row, entry, j] = c s A_j x[row]``: a program per (entry's row block, module, ranks)."""
    block, which, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.load(entry_block + block)
    adapter = tl.load(slot + entry)
    place = (adapter.to(tl.int64) * LAYERS + layer) * 7 + FIRST_MODULE + which
    vectors = tl.load(rank + place)
    if tile * RANKS >= vectors:
        return
    run = tl.load(run_of_entry + entry)
    first = tl.load(entry_block_row + block)
    rows = first + tl.arange(0, ROWS)
    real = rows < tl.load(row_start + run + 1)
    ranks = tile * RANKS + tl.arange(0, RANKS)
    known = ranks < vectors
    PADDED: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK * CHUNK
    element = tl.load(a_offset + place) + ranks.to(tl.int64) * PADDED
    mine = slices + tl.load(list_start + adapter)
    xs = x + rows.to(tl.int64) * WIDTH
    code = tl.load(dtype + adapter)
    if code == 2:
        acc = _project(
            xs, real, arena, mine, element, known,
            tl.bfloat16, WIDTH, SLICE_BYTES, CHUNK, ROWS, RANKS, PRECISION,
        )  # fmt: skip
    elif code == 1:
        acc = _project(
            xs, real, arena, mine, element, known,
            tl.float16, WIDTH, SLICE_BYTES, CHUNK, ROWS, RANKS, PRECISION,
        )  # fmt: skip
    else:
        acc = _project(
            xs, real, arena, mine, element, known,
            tl.float32, WIDTH, SLICE_BYTES, CHUNK, ROWS, RANKS, "tf32x3",
        )  # fmt: skip
    acc *= tl.load(request_scale + entry) * tl.load(scale + place)
    pairs = tl.load(pair_start + entry) + rows - tl.load(row_start + run)
    to = (pairs.to(tl.int64) * MODULES + which) * pitch
    tl.store(h + to[:, None] + ranks[None, :], acc, mask=real[:, None] & known[None, :])


@triton.jit
def _lift(
    acc,
    h,
    real,
    arena,
    slices,
    element,
    padded,
    vectors,
    DTYPE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``acc + h B`` [ROWS, CHUNK] for one chunk of every vector of B, in order."""
    for j in range(0, vectors, RANKS):
        ranks = j + tl.arange(0, RANKS)
        known = ranks < vectors
        small = tl.load(h[:, None] + ranks[None, :], mask=real[:, None] & known[None, :], other=0)
        at = element + ranks.to(tl.int64) * padded
        b = _vectors(arena, slices, at, known, DTYPE, SLICE_BYTES, CHUNK)
        acc = tl.dot(small, b, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["layer", "pitch"])
def expand_kernel(
    y,
    h,
    arena,
    slices,
    list_start,
    dtype,
    b_offset,
    rank,
    out_width,
    row_start,
    entry_start,
    slot,
    pair_start,
    run_block,
    run_block_row,
    layer,
    pitch,
    ROW_WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``y[row] += sum_entries h B``: a program per (run's row block, module, chunk of columns),
    the only writer of its elements, so the order is that of the entries."""
    block, which, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = tl.load(out_width + FIRST_MODULE + which)
    if tile * CHUNK >= width:
        return
    before = tl.zeros((), dtype=tl.int64)
    for module in range(FIRST_MODULE, FIRST_MODULE + which):
        before += tl.load(out_width + module)
    padded = (width + CHUNK - 1) // CHUNK * CHUNK
    run = tl.load(run_block + block)
    first = tl.load(run_block_row + block)
    rows = first + tl.arange(0, ROWS)
    run_start = tl.load(row_start + run)
    real = rows < tl.load(row_start + run + 1)
    acc = tl.zeros((ROWS, CHUNK), dtype=tl.float32)
    for entry in range(tl.load(entry_start + run), tl.load(entry_start + run + 1)):
        adapter = tl.load(slot + entry)
        place = (adapter.to(tl.int64) * LAYERS + layer) * 7 + FIRST_MODULE + which
        vectors = tl.load(rank + place)
        pairs = tl.load(pair_start + entry) + rows - run_start
        hs = h + (pairs.to(tl.int64) * MODULES + which) * pitch
        element = tl.load(b_offset + place) + tile * CHUNK
        mine = slices + tl.load(list_start + adapter)
        code = tl.load(dtype + adapter)
        if code == 2:
            acc = _lift(
                acc, hs, real, arena, mine, element, padded, vectors,
                tl.bfloat16, SLICE_BYTES, CHUNK, RANKS,
            )  # fmt: skip
        elif code == 1:
            acc = _lift(
                acc, hs, real, arena, mine, element, padded, vectors,
                tl.float16, SLICE_BYTES, CHUNK, RANKS,
            )  # fmt: skip
        else:
            acc = _lift(
                acc, hs, real, arena, mine, element, padded, vectors,
                tl.float32, SLICE_BYTES, CHUNK, RANKS,
            )  # fmt: skip
    columns = tile * CHUNK + tl.arange(0, CHUNK)
    to = y + rows.to(tl.int64)[:, None] * ROW_WIDTH + before + columns[None, :]
    inside = real[:, None] & (columns < width)[None, :]
    total = tl.load(to, mask=inside, other=0).to(tl.float32) + acc
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)
