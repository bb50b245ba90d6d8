"""An adapter's place in the pool and in the kernels' table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.arrivals import Arrival
from loramux.adapters.pack import Layout, PackedAdapter
from loramux.memory.formats import AdapterFormat


class Table(Protocol):
    """The kernels' view of resident adapters (``loramux_kernels.lora.AdapterTable``)."""

    def add(
        self,
        *,
        slices: npt.NDArray[np.int64],
        a_offset: npt.NDArray[np.int64],
        b_offset: npt.NDArray[np.int64],
        rank: npt.NDArray[np.int32],
        scale: npt.NDArray[np.float32],
        dtype: torch.dtype,
        middle_offset: npt.NDArray[np.int64],
        vector_offset: npt.NDArray[np.int64],
        token_ids_offset: npt.NDArray[np.int64],
        token_rows_offset: npt.NDArray[np.int64],
        num_token_rows: npt.NDArray[np.int32],
    ) -> int: ...
    def remove(self, slot: int) -> None: ...


@dataclass(slots=True)
class Resident:
    """An adapter that has its frames; without a ``slot`` it is on its way into them.

    ``leases`` counts those that run on it or keep it for another reason; ``dependents`` are the
    digests, here or on their way, that have this one for a basis; ``used_at``: when a row last
    began to run on it.
    """

    packed: PackedAdapter
    frames: list[int]
    slot: int | None = None
    leases: int = 0
    pinned: bool = False
    arrival: Arrival | None = None
    dependents: set[str] = field(default_factory=set)
    used_at: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing speaks against its eviction."""
        return self.slot is not None and self.leases == 0 and not self.pinned

    def enter(self, table: Table, pool: AdapterFormat, basis: Resident | None) -> None:
        """Make the kernels know it, behind the slices of its ``basis`` if it has one."""
        layout: Layout = self.packed
        slices = pool.slices(self.frames)
        if basis is not None:
            shared = pool.slices(basis.frames)
            layout = self.packed.after(basis.packed, len(shared) * pool.frame.slice_bytes)
            slices = np.concatenate((shared, slices))
        self.slot = table.add(
            slices=slices,
            a_offset=layout.a_offset,
            b_offset=layout.b_offset,
            rank=layout.rank,
            scale=layout.scale,
            dtype=getattr(torch, layout.dtype),
            middle_offset=layout.middle_offset,
            vector_offset=layout.vector_offset,
            token_ids_offset=layout.token_ids_offset,
            token_rows_offset=layout.token_rows_offset,
            num_token_rows=layout.num_token_rows,
        )
