"""One step's LoRA work as lists that a fixed grid of GPU programs takes items from.

A row that is its request's only one in the step (a decode) goes to the one-row kernels, every other
to the tensor-core tiles; the two sum in different orders. The choice looks at the row's own request
alone, so who else wears the adapter shows in no bit. The lists are in terms of the largest rank an
adapter has anywhere: they serve all layers and sites, and a program that finds a smaller rank (or
none) there has less to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux_kernels.blocks import Int32, row_blocks, spread
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.table import AdapterTable
from loramux_kernels.mirror import Arrays

RANK_TILE = 16
MOST_MODULES = 3
"""Modules of the widest site (q, k, v): what a (row, entry) pair has room for in the scratch."""
COUNTED = ("shrink_rows", "shrink_tiles", "expand_rows", "expand_tiles")
"""The lists of items, as ``lora_counts`` counts them."""


@dataclass(frozen=True)
class LoraWork:
    """``arrays`` go to the device; an *entry* is one adapter of one run.

    ``lora_slot``, ``lora_scale``, ``lora_first_row`` (of its run), ``lora_pitch`` (room for its
    ranks, in elements) and ``lora_h_start`` are [entries], the last saying where in the scratch
    ``h[row of the run, module, rank]`` of the entry begins; ``lora_entry_start`` is [runs + 1].

    Items are [n, 4]: ``shrink_*`` (entry, first row, rows, tile of ranks), ``expand_*`` (run, first
    row, rows, 0); ``lora_counts`` [4]: see COUNTED.
    """

    arrays: Arrays
    h_elements: int
    any_rows: bool
    any_tiles: bool


RECORDED = LoraWork({}, 0, any_rows=True, any_tiles=False)
"""Of a step recorded in a CUDA graph: lone rows, wearing whatever the lists of a replay say."""


def lora_work(
    runs: Runs,
    table: AdapterTable,
    *,
    lone_rows: int,
    lone_ranks: int,
    alone: npt.NDArray[np.bool_] | None = None,
) -> LoraWork:
    """The work of ``runs``. ``alone[t]``: token row t is the only one of its request; without it,
    the rows of one-row runs are."""
    rows, entries = np.diff(runs.row_start), np.diff(runs.entry_start)
    run_of_row = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    if alone is None:
        alone = rows[run_of_row] == 1
    run_of_entry, _ = spread(entries)
    ranks = table.rank[runs.slot].max(axis=(1, 2), initial=0)
    pitch = -(-ranks // RANK_TILE) * RANK_TILE
    h_sizes = rows[run_of_entry].astype(np.int64) * MOST_MODULES * pitch
    h_ends = np.cumsum(h_sizes)
    owner, first, count, lone = _stretches(run_of_row, alone, entries > 0)
    expand_rows = _blocks(owner[lone], first[lone], count[lone], lone_rows)
    expand_tiles = _blocks(owner[~lone], first[~lone], count[~lone], ROW_BLOCK)
    shrink_rows = _shrink(expand_rows, runs.entry_start, ranks, lone_ranks)
    shrink_tiles = _shrink(expand_tiles, runs.entry_start, ranks, RANK_TILE)
    lists = {
        "expand_rows": expand_rows,
        "expand_tiles": expand_tiles,
        "shrink_tiles": shrink_tiles,
        "shrink_rows": shrink_rows,
    }
    arrays = {
        "lora_counts": np.array([len(lists[name]) for name in COUNTED], np.int32),
        "lora_slot": runs.slot,
        "lora_scale": runs.scale,
        "lora_first_row": runs.row_start[run_of_entry],
        "lora_pitch": pitch.astype(np.int32),
        "lora_h_start": h_ends - h_sizes,
        "lora_entry_start": runs.entry_start,
        **lists,
    }
    return LoraWork(arrays, int(h_sizes.sum()), len(expand_rows) > 0, len(expand_tiles) > 0)


def _stretches(
    run_of_row: Int32, alone: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_]
) -> tuple[Int32, Int32, Int32, npt.NDArray[np.bool_]]:
    """Maximal stretches of rows of one run and one kind, in runs that have entries: the run, the
    first row, the rows and whether they are alone."""
    key = run_of_row.astype(np.int64) * 2 + alone
    first = np.flatnonzero(np.diff(key, prepend=-1)).astype(np.int32)
    count = np.diff(first, append=len(key)).astype(np.int32)
    kept = wanted[run_of_row[first]]
    first, count = first[kept], count[kept]
    return run_of_row[first], first, count, alone[first]


def _blocks(run: Int32, first: Int32, count: Int32, size: int) -> Int32:
    """Items (run, first row, rows, 0) of at most ``size`` rows."""
    owner, row = row_blocks(count, first, size)
    rows = np.minimum(size, (first + count)[owner] - row)
    return np.stack([run[owner], row, rows, np.zeros_like(row)], axis=1).astype(np.int32)


def _shrink(blocks: Int32, entry_start: Int32, ranks: Int32, size: int) -> Int32:
    """Items (entry, first row, rows, tile of ``size`` ranks) for every entry of every block."""
    run = blocks[:, 0]
    block, nth = spread(entry_start[run + 1] - entry_start[run])
    entry = entry_start[run[block]] + nth
    pair, tile = spread(-(-ranks[entry] // size))
    chosen = block[pair]
    return np.stack([entry[pair], blocks[chosen, 1], blocks[chosen, 2], tile], axis=1).astype(
        np.int32
    )
