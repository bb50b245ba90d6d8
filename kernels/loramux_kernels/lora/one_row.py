"""LoRA for a row that is alone: broadcast, multiply, sum; bound by memory, no tensor cores."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from loramux_kernels.lora.streams import site_column, starts, vectors_of


@triton.jit
def _dot_row(
    x,
    arena,
    slices,
    element,
    known,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``A x`` [RANKS] for the row at ``x``: CHUNKS chunks of every vector at a time."""
    pool = arena.to(tl.pointer_type(DTYPE))
    lanes = tl.arange(0, CHUNK)
    chunks = tl.arange(0, CHUNKS) * CHUNK
    acc = tl.zeros((RANKS, CHUNKS, CHUNK), dtype=tl.float32)
    for k in range(0, WIDTH, CHUNKS * CHUNK):
        held = known[:, None] & (k + chunks < WIDTH)[None, :]
        at = starts(slices, element[:, None] + (k + chunks)[None, :], held, DTYPE, SLICE_BYTES)
        at = tl.multiple_of(at, [CHUNK, CHUNK])
        a = tl.load(
            pool + at[:, :, None] + lanes[None, None, :], mask=held[:, :, None], other=0
        ).to(tl.float32)
        columns = k + chunks[:, None] + lanes[None, :]
        row = tl.load(x + columns, mask=columns < WIDTH, other=0).to(tl.float32)
        acc += a * row[None, :, :]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit(do_not_specialize=["layer"])
def shrink_rows_kernel(
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
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    TABLE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``h[row, entry, j] = c s A_j x[row]``, row by row: the rows of an item find A in a cache."""
    PADDED: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK * CHUNK
    for index in range(tl.program_id(0), tl.load(counts) * MODULES, tl.num_programs(0)):
        item = items + index // MODULES * 4
        which = index % MODULES
        entry = tl.load(item)
        adapter = tl.load(slot + entry)
        place = (adapter.to(tl.int64) * LAYERS + layer) * TABLE + FIRST_MODULE + which
        vectors = tl.load(rank + place)
        ranks = tl.load(item + 3) * RANKS + tl.arange(0, RANKS)
        known = ranks < vectors
        first = tl.load(item + 1)
        # Where the adapter has fewer ranks here than elsewhere, no row is visited.
        rows = tl.where(tl.load(item + 3) * RANKS < vectors, tl.load(item + 2), 0)
        element = tl.load(a_offset + place) + ranks.to(tl.int64) * PADDED
        mine = slices + tl.load(list_start + adapter)
        code = tl.load(dtype + adapter)
        factor = tl.load(request_scale + entry) * tl.load(scale + place)
        to = h + tl.load(h_start + entry) + which * tl.load(pitch + entry) + ranks
        stride = MODULES * tl.load(pitch + entry)
        for nth in range(rows):
            row = first + nth
            xs = x + row.to(tl.int64) * WIDTH
            if code == 2:
                dots = _dot_row(
                    xs, arena, mine, element, known,
                    tl.bfloat16, WIDTH, SLICE_BYTES, CHUNK, CHUNKS, RANKS,
                )  # fmt: skip
            elif code == 1:
                dots = _dot_row(
                    xs, arena, mine, element, known,
                    tl.float16, WIDTH, SLICE_BYTES, CHUNK, CHUNKS, RANKS,
                )  # fmt: skip
            else:
                dots = _dot_row(
                    xs, arena, mine, element, known,
                    tl.float32, WIDTH, SLICE_BYTES, CHUNK, CHUNKS, RANKS,
                )  # fmt: skip
            pair = row - tl.load(first_row + entry)
            tl.store(to + pair.to(tl.int64) * stride, dots * factor, mask=known)


@triton.jit
def _lift_row(
    acc,
    h,
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
    """``acc + h_j B_j`` [RANKS, CHUNK], unsummed over a tile of ranks, tile after tile."""
    for j in range(0, vectors, RANKS):
        ranks = j + tl.arange(0, RANKS)
        known = ranks < vectors
        small = tl.load(h + ranks, mask=known, other=0)
        at = element + ranks.to(tl.int64) * padded
        acc += small[:, None] * vectors_of(arena, slices, at, known, DTYPE, SLICE_BYTES, CHUNK)
    return acc


@triton.jit(do_not_specialize=["layer"])
def expand_rows_kernel(
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
    RANKS: tl.constexpr,
):
    """``y[row] += sum_entries h B``, row by row: an item is (run, rows, chunk of columns)."""
    TILES: tl.constexpr = (
        (OUT0 + CHUNK - 1) // CHUNK + (OUT1 + CHUNK - 1) // CHUNK + (OUT2 + CHUNK - 1) // CHUNK
    )
    for index in range(tl.program_id(0), tl.load(counts + 2) * TILES, tl.num_programs(0)):
        item = items + index // TILES * 4
        which, tile, width, before = site_column(index % TILES, OUT0, OUT1, OUT2, CHUNK)
        padded = (width + CHUNK - 1) // CHUNK * CHUNK
        columns = tile * CHUNK + tl.arange(0, CHUNK)
        run, first = tl.load(item), tl.load(item + 1)
        for nth in range(tl.load(item + 2)):
            row = first + nth
            acc = tl.zeros((RANKS, CHUNK), dtype=tl.float32)
            for entry in range(tl.load(entry_start + run), tl.load(entry_start + run + 1)):
                adapter = tl.load(slot + entry)
                place = (adapter.to(tl.int64) * LAYERS + layer) * TABLE + FIRST_MODULE + which
                vectors = tl.load(rank + place)
                pair = (row - tl.load(first_row + entry)).to(tl.int64)
                hs = (
                    h + tl.load(h_start + entry) + (pair * MODULES + which) * tl.load(pitch + entry)
                )
                element = tl.load(b_offset + place) + tile * CHUNK
                mine = slices + tl.load(list_start + adapter)
                code = tl.load(dtype + adapter)
                if code == 2:
                    acc = _lift_row(
                        acc, hs, arena, mine, element, padded, vectors,
                        tl.bfloat16, SLICE_BYTES, CHUNK, RANKS,
                    )  # fmt: skip
                elif code == 1:
                    acc = _lift_row(
                        acc, hs, arena, mine, element, padded, vectors,
                        tl.float16, SLICE_BYTES, CHUNK, RANKS,
                    )  # fmt: skip
                else:
                    acc = _lift_row(
                        acc, hs, arena, mine, element, padded, vectors,
                        tl.float32, SLICE_BYTES, CHUNK, RANKS,
                    )  # fmt: skip
            to = y + row.to(tl.int64) * ROW_WIDTH + before + columns
            total = tl.load(to, mask=columns < width, other=0).to(tl.float32) + tl.sum(acc, 0)
            tl.store(to, total.to(y.dtype.element_ty), mask=columns < width)
