"""``R (A x)`` between shrink and expand, for adapters whose A and B are others' too."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from loramux_kernels.lora.streams import vectors_of
from loramux_kernels.tuning import Launch

LAUNCH = Launch(warps=4, stages=1, programs_per_sm=4, registers=64)
"""A tile of R is at most 16 vectors of 128 elements: sixteen for each thread of four warps."""


@triton.jit
def _turn(
    h,
    arena,
    slices,
    element,
    known,
    width,
    DTYPE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``R h`` [RANKS] for the vector at ``h`` and the vectors of R from ``element``."""
    lanes = tl.arange(0, CHUNK)
    acc = tl.zeros((RANKS, CHUNK), dtype=tl.float32)
    for j in range(0, width, CHUNK):
        r = vectors_of(arena, slices, element + j, known, DTYPE, SLICE_BYTES, CHUNK)
        acc += r * tl.load(h + j + lanes, mask=j + lanes < width, other=0)[None, :]
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["layer"])
def middle_kernel(
    m,
    h,
    arena,
    slices,
    list_start,
    dtype,
    middle_offset,
    rank,
    slot,
    first_row,
    pitch,
    h_start,
    items,
    counts,
    layer,
    LIST: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    TABLE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``m[row, entry, j] = R_j h[row, entry]``, or ``h`` again where an entry has no middle. The
    items are those of the shrink that wrote ``h``, the LIST-th of the counts."""
    for index in range(tl.program_id(0), tl.load(counts + LIST) * MODULES, tl.num_programs(0)):
        item = items + index // MODULES * 4
        which = index % MODULES
        entry = tl.load(item)
        adapter = tl.load(slot + entry)
        place = (adapter.to(tl.int64) * LAYERS + layer) * TABLE + FIRST_MODULE + which
        width = tl.load(rank + place)
        first = tl.load(item + 3) * RANKS
        ranks = first + tl.arange(0, RANKS)
        known = ranks < width
        # Where the adapter has fewer ranks here than elsewhere, no row is visited.
        rows = tl.where(first < width, tl.load(item + 2), 0)
        offset = tl.load(middle_offset + place)
        element = offset + ranks.to(tl.int64) * ((width + CHUNK - 1) // CHUNK * CHUNK)
        mine = slices + tl.load(list_start + adapter)
        code = tl.load(dtype + adapter)
        start = tl.load(h_start + entry) + which * tl.load(pitch + entry)
        stride = MODULES * tl.load(pitch + entry)
        for nth in range(rows):
            pair = tl.load(item + 1) + nth - tl.load(first_row + entry)
            at = start + pair.to(tl.int64) * stride
            if offset < 0:
                turned = tl.load(h + at + ranks, mask=known, other=0)
            elif code == 2:
                turned = _turn(
                    h + at, arena, mine, element, known, width,
                    tl.bfloat16, SLICE_BYTES, CHUNK, RANKS,
                )  # fmt: skip
            elif code == 1:
                turned = _turn(
                    h + at, arena, mine, element, known, width,
                    tl.float16, SLICE_BYTES, CHUNK, RANKS,
                )  # fmt: skip
            else:
                turned = _turn(
                    h + at, arena, mine, element, known, width,
                    tl.float32, SLICE_BYTES, CHUNK, RANKS,
                )  # fmt: skip
            tl.store(m + at + ranks, turned, mask=known)
