"""Cutting ragged rows into blocks, the unit in which kernels hand out work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def row_blocks(rows: Int32, first_row: Int32, size: int) -> tuple[Int32, Int32]:
    """Cut each owner's ``rows`` consecutive rows into blocks of at most ``size``: the owner and
    the first row of every block."""
    counts = -(-rows // size)
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, (first_row[owner] + within * size).astype(np.int32)
