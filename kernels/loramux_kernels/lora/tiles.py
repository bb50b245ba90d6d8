"""LoRA for rows side by side: tiles of 16 rows on the tensor cores."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from loramux_kernels.lora.streams import site_column, vectors_of


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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x A^T`` [ROWS, RANKS] for rows at the pointers ``x`` and the vectors from ``element``.

    BLOCK columns at a time divide a chunk: an operand of a whole chunk takes all registers."""
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK):
        a = vectors_of(arena, slices, element + k, known, DTYPE, SLICE_BYTES, BLOCK)
        inside = real[:, None] & (k + lanes < WIDTH)[None, :]
        rows = tl.load(x[:, None] + k + lanes[None, :], mask=inside, other=0).to(tl.float32)
        acc = tl.dot(rows, tl.trans(a), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["layer"])
def shrink_tiles_kernel(
    h,
    x,
    arena,
    slices,
    list_start,
    dtype,
    a_offset,
    rank,
    scale,
    slot,
    first_row,
    pitch,
    h_start,
    request_scale,
    items,
    counts,
    layer,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    TABLE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``h[row, entry, j] = c s A_j x[row]``: an item is (entry, ROWS rows, RANKS ranks)."""
    PADDED: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK * CHUNK
    for index in range(tl.program_id(0), tl.load(counts + 1) * MODULES, tl.num_programs(0)):
        item = items + index // MODULES * 4
        which = index % MODULES
        entry = tl.load(item)
        adapter = tl.load(slot + entry)
        place = (adapter.to(tl.int64) * LAYERS + layer) * TABLE + FIRST_MODULE + which
        vectors = tl.load(rank + place)
        tile = tl.load(item + 3)
        if tile * RANKS < vectors:
            rows = tl.load(item + 1) + tl.arange(0, ROWS)
            real = tl.arange(0, ROWS) < tl.load(item + 2)
            ranks = tile * RANKS + tl.arange(0, RANKS)
            known = ranks < vectors
            element = tl.load(a_offset + place) + ranks.to(tl.int64) * PADDED
            mine = slices + tl.load(list_start + adapter)
            xs = x + rows.to(tl.int64) * WIDTH
            code = tl.load(dtype + adapter)
            if code == 2:
                acc = _project(
                    xs, real, arena, mine, element, known,
                    tl.bfloat16, WIDTH, SLICE_BYTES, BLOCK, ROWS, RANKS, PRECISION,
                )  # fmt: skip
            elif code == 1:
                acc = _project(
                    xs, real, arena, mine, element, known,
                    tl.float16, WIDTH, SLICE_BYTES, BLOCK, ROWS, RANKS, PRECISION,
                )  # fmt: skip
            else:
                acc = _project(
                    xs, real, arena, mine, element, known,
                    tl.float32, WIDTH, SLICE_BYTES, BLOCK, ROWS, RANKS, "tf32x3",
                )  # fmt: skip
            acc *= tl.load(request_scale + entry) * tl.load(scale + place)
            wide = tl.load(pitch + entry)
            pairs = (rows - tl.load(first_row + entry)).to(tl.int64)
            to = h + tl.load(h_start + entry) + (pairs * MODULES + which) * wide
            tl.store(to[:, None] + ranks[None, :], acc, mask=real[:, None] & known[None, :])


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
        b = vectors_of(arena, slices, at, known, DTYPE, SLICE_BYTES, CHUNK)
        acc = tl.dot(small, b, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["layer"])
def expand_tiles_kernel(
    y,
    h,
    arena,
    slices,
    list_start,
    dtype,
    b_offset,
    rank,
    slot,
    first_row,
    pitch,
    h_start,
    entry_start,
    items,
    counts,
    layer,
    ROW_WIDTH: tl.constexpr,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    TABLE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``y[row] += sum_entries h B``: an item is (run, ROWS rows, chunk of columns), the only
    writer of its elements, so the order is that of the entries."""
    TILES: tl.constexpr = (
        (OUT0 + CHUNK - 1) // CHUNK + (OUT1 + CHUNK - 1) // CHUNK + (OUT2 + CHUNK - 1) // CHUNK
    )
    for index in range(tl.program_id(0), tl.load(counts + 3) * TILES, tl.num_programs(0)):
        item = items + index // TILES * 4
        which, tile, width, before = site_column(index % TILES, OUT0, OUT1, OUT2, CHUNK)
        padded = (width + CHUNK - 1) // CHUNK * CHUNK
        columns = tile * CHUNK + tl.arange(0, CHUNK)
        run = tl.load(item)
        rows = tl.load(item + 1) + tl.arange(0, ROWS)
        real = tl.arange(0, ROWS) < tl.load(item + 2)
        acc = tl.zeros((ROWS, CHUNK), dtype=tl.float32)
        for entry in range(tl.load(entry_start + run), tl.load(entry_start + run + 1)):
            adapter = tl.load(slot + entry)
            place = (adapter.to(tl.int64) * LAYERS + layer) * TABLE + FIRST_MODULE + which
            vectors = tl.load(rank + place)
            pairs = (rows - tl.load(first_row + entry)).to(tl.int64)
            hs = h + tl.load(h_start + entry) + (pairs * MODULES + which) * tl.load(pitch + entry)
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
        to = y + rows.to(tl.int64)[:, None] * ROW_WIDTH + before + columns[None, :]
        inside = real[:, None] & (columns < width)[None, :]
        total = tl.load(to, mask=inside, other=0).to(tl.float32) + acc
        tl.store(to, total.to(y.dtype.element_ty), mask=inside)
