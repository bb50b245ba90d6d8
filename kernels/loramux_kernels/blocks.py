"""Cutting ragged rows into blocks, the unit in which kernels hand out work."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def spread(counts: npt.NDArray[Any]) -> tuple[Int32, npt.NDArray[np.int64]]:
    """``counts[i]`` items of each owner i: every item's owner, and its number within the owner."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def row_blocks(rows: Int32, first_row: Int32, size: int | Int32) -> tuple[Int32, Int32]:
    """Cut each owner's ``rows`` consecutive rows into blocks of at most ``size``, one for all or
    each owner's own: the owner and the first row of every block."""
    owner, within = spread(-(-rows // size))
    step = size if isinstance(size, int) else size[owner]
    return owner, (first_row[owner] + within * step).astype(np.int32)
