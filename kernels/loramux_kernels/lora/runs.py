"""One step's rows grouped into runs that share one ordered adapter list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Runs:
    """Run i holds token rows ``row_start[i]:row_start[i+1]`` and table slots
    ``slot[entry_start[i]:entry_start[i+1]]`` with the requests' scales. A base row's run has no
    entries. Neighbouring runs with equal lists should be one run: each run reads its weights once.

    ``run_of_entry`` [E] and ``pair_start`` [E+1] are derived: the (row, entry) pairs of entry e
    are numbered from ``pair_start[e]``, one per row of its run.
    """

    row_start: npt.NDArray[np.int32]
    entry_start: npt.NDArray[np.int32]
    slot: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    run_of_entry: npt.NDArray[np.int32] = field(init=False)
    pair_start: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        entries = np.diff(self.entry_start)
        run_of_entry = np.repeat(np.arange(len(entries), dtype=np.int32), entries)
        rows = np.diff(self.row_start)[run_of_entry]
        pair_start = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
        object.__setattr__(self, "run_of_entry", run_of_entry)
        object.__setattr__(self, "pair_start", pair_start)

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

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])
