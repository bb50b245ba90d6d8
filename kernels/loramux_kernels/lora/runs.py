"""One step's rows grouped into runs that share one ordered adapter list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.blocks import row_blocks
from loramux_kernels.lora.table import SITES, TABLE_SITES, AdapterTable

if TYPE_CHECKING:
    from loramux_kernels.lora.work import LoraWork

ROW_BLOCK = 16
"""Rows that one work item takes together, so that they read each weight from memory once."""


@dataclass(frozen=True)
class Runs:
    """Run i holds token rows ``row_start[i]:row_start[i+1]`` and table slots
    ``slot[entry_start[i]:entry_start[i+1]]`` with the requests' scales. A base row's run has no
    entries. Neighbouring runs with equal lists should be one run: each run reads its weights once.

    Derived, once a step: ``run_of_entry`` [E]; ``pair_start`` [E+1], the (row, entry) pairs of
    entry e being numbered from ``pair_start[e]``, one per row of its run; and the blocks of at
    most ROW_BLOCK rows of every entry (``entry_block``: its entry, ``entry_block_row``: its first
    row) and of every run that has entries (``run_block``, ``run_block_row``).
    """

    row_start: npt.NDArray[np.int32]
    entry_start: npt.NDArray[np.int32]
    slot: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    run_of_entry: npt.NDArray[np.int32] = field(init=False)
    pair_start: npt.NDArray[np.int32] = field(init=False)
    entry_block: npt.NDArray[np.int32] = field(init=False)
    entry_block_row: npt.NDArray[np.int32] = field(init=False)
    run_block: npt.NDArray[np.int32] = field(init=False)
    run_block_row: npt.NDArray[np.int32] = field(init=False)
    _top_ranks: list[npt.NDArray[np.int64]] = field(default_factory=list, init=False, repr=False)
    _middles: list[npt.NDArray[np.bool_]] = field(default_factory=list, init=False, repr=False)
    _modulated: list[npt.NDArray[np.bool_]] = field(default_factory=list, init=False, repr=False)
    _on_device: list[tuple[LoraWork, dict[str, torch.Tensor]]] = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self) -> None:
        rows, entries = np.diff(self.row_start), np.diff(self.entry_start)
        run_of_entry = np.repeat(np.arange(len(entries), dtype=np.int32), entries)
        pairs = np.concatenate(([0], np.cumsum(rows[run_of_entry]))).astype(np.int32)
        of_entry = row_blocks(rows[run_of_entry], self.row_start[run_of_entry], ROW_BLOCK)
        of_run = row_blocks(np.where(entries > 0, rows, 0), self.row_start[:-1], ROW_BLOCK)
        derived = (run_of_entry, pairs, *of_entry, *of_run)
        names = (f.name for f in fields(self) if not f.init and not f.name.startswith("_"))
        for name, value in zip(names, derived, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def build(cls, rows: Sequence[int], adapters: Sequence[Sequence[tuple[int, float]]]) -> Runs:
        """Run i has ``rows[i]`` token rows and the entries ``adapters[i]``: (slot, scale) pairs."""
        if len(rows) != len(adapters):
            raise ValueError(f"Runs.build: {len(rows)} row counts, {len(adapters)} adapter lists")
        entries = [entry for run in adapters for entry in run]
        return cls(
            row_start=np.array([0, *accumulate(rows)], dtype=np.int32),
            entry_start=np.array([0, *accumulate(map(len, adapters))], dtype=np.int32),
            slot=np.array([slot for slot, _ in entries], dtype=np.int32),
            scale=np.array([scale for _, scale in entries], dtype=np.float32),
        )

    def top_ranks(self, table: AdapterTable) -> npt.NDArray[np.int64]:
        """``[layers, sites]``: the largest rank any entry has at a layer's site; 0 when none
        changes it. Looked up once, since residency does not change during a step."""
        if not self._top_ranks:
            self._top_ranks.append(table.site_rank[self.slot].max(axis=0, initial=0))
        return self._top_ranks[0]

    def top_rank(self, table: AdapterTable, layer: int, site: str) -> int:
        return int(self.top_ranks(table)[layer, list(TABLE_SITES).index(site)])

    def reaches(self, table: AdapterTable, layer: int, site: str) -> bool:
        """False when no entry changes the site and nothing need be launched for it. A recorded
        launch (``bind`` without arrays) reaches every site: its replays may."""
        recorded = self._on_device and not self._on_device[0][0].arrays
        return bool(recorded) or self.top_rank(table, layer, site) > 0

    def middles(self, table: AdapterTable) -> npt.NDArray[np.bool_]:
        """``[layers, sites]``: whether any entry has a middle at a layer's site."""
        if not self._middles:
            self._middles.append(table.site_middles[self.slot].max(axis=0, initial=False))
        return self._middles[0]

    def has_middle(self, table: AdapterTable, layer: int, site: str) -> bool:
        return bool(self.middles(table)[layer, list(TABLE_SITES).index(site)])

    def modulated(self, table: AdapterTable) -> npt.NDArray[np.bool_]:
        """``[layers, sites, 2]``: whether any entry has vectors on the outputs (0), on the inputs
        (1) of a layer's site."""
        if not self._modulated:
            self._modulated.append(table.site_vectors[self.slot].max(axis=0, initial=False))
        return self._modulated[0]

    def of_rows(self, rows: npt.NDArray[np.int64]) -> Runs:
        """These token rows, in this order, each with its own entries."""
        run = np.searchsorted(self.row_start, rows, side="right") - 1
        first = np.flatnonzero(np.diff(run, prepend=-1))
        counts = np.diff(first, append=len(rows)).tolist()
        bounds = [(self.entry_start[i], self.entry_start[i + 1]) for i in run[first]]
        lists = [
            list(zip(self.slot[a:b].tolist(), self.scale[a:b].tolist(), strict=True))
            for a, b in bounds
        ]
        return Runs.build(counts, lists)

    def names_tokens(self, table: AdapterTable, where: int) -> bool:
        """Whether any entry has rows for single tokens in EMBEDDING or HEAD."""
        return bool(table.num_token_rows[self.slot, where].any())

    def is_plain(self, table: AdapterTable) -> bool:
        """Whether all entries are pairs at the modules of layers, A and B and nothing else."""
        elsewhere = self.top_ranks(table)[:, len(SITES) :]
        tokens = table.num_token_rows[self.slot]
        beside = self.modulated(table).any() or self.middles(table).any()
        return not (beside or elsewhere.any() or tokens.any())

    def bind(self, work: LoraWork, tensors: dict[str, torch.Tensor]) -> None:
        """``tensors`` are the arrays of ``work``, this step's, as a device sees them."""
        self._on_device[:] = [(work, tensors)]

    @property
    def on_device(self) -> tuple[LoraWork, dict[str, torch.Tensor]] | None:
        """What ``bind`` was given."""
        return self._on_device[0] if self._on_device else None

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])
