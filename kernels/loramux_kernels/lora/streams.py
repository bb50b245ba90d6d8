"""What the LoRA kernels of a GPU share: reading vectors of paged adapters, finding columns."""

# Triton reads the kernels' annotations as code: only constexpr may stand there.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def starts(slices, element, known, DTYPE: tl.constexpr, SLICE_BYTES: tl.constexpr):
    """Where in the pool, in elements, the chunks that begin at ``element`` lie."""
    ITEMSIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    PER_SLICE: tl.constexpr = SLICE_BYTES // ITEMSIZE
    # A chunk lies within one slice, and slices are aligned to chunks.
    start = tl.load(slices + element // PER_SLICE, mask=known, other=0)
    return start // ITEMSIZE + element % PER_SLICE


@triton.jit
def vectors_of(
    arena,
    slices,
    element,
    known,
    DTYPE: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of each vector whose next element is ``element[i]``, as fp32 [vectors, CHUNK]."""
    pool = arena.to(tl.pointer_type(DTYPE))
    at = tl.multiple_of(starts(slices, element, known, DTYPE, SLICE_BYTES), CHUNK)
    lanes = tl.arange(0, CHUNK)
    return tl.load(pool + at[:, None] + lanes[None, :], mask=known[:, None], other=0).to(tl.float32)


@triton.jit
def site_column(
    tile,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Which module the ``tile``-th chunk of a site's columns belongs to, the chunk's number there,
    the module's width and the columns before it."""
    TILES0: tl.constexpr = (OUT0 + CHUNK - 1) // CHUNK
    TILES1: tl.constexpr = (OUT1 + CHUNK - 1) // CHUNK
    past0 = (tile >= TILES0) * 1
    past1 = (tile >= TILES0 + TILES1) * 1
    width = OUT0 + past0 * (OUT1 - OUT0) + past1 * (OUT2 - OUT1)
    return past0 + past1, tile - past0 * TILES0 - past1 * TILES1, width, past0 * OUT0 + past1 * OUT1
