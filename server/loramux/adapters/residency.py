"""Which adapters are in the pool: loading beside the step loop, leased while in use, then warm.

    absent ──request──> loading ──poll──> warm <──release/lease──> leased
      ^                    │ (read failed)  │ (evicted)
      └────────────────────┴────────────────┘

A thread reads the packed file straight into the frames; the step loop never waits for it. All
methods are called by the engine's own thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import Store
from loramux.errors import AdapterLoadFailed, LoramuxError
from loramux.memory.formats import AdapterFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.metrics.stats import AdapterLoad

ASSUMED_LOAD_S_PER_BYTE = 1e-9
"""Until a first load is measured: what bringing one byte back costs (1 GB/s)."""


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
    ) -> int: ...
    def remove(self, slot: int) -> None: ...


@dataclass(slots=True)
class _Resident:
    packed: PackedAdapter
    frames: list[int]
    slot: int | None = None
    leases: int = 0
    pinned: bool = False
    begun: float = field(default_factory=time.monotonic)


class Residency:
    """Adapters in the pool by digest.

    ``on_loaded`` is called on the loader's thread when there is something to ``poll``.
    """

    def __init__(
        self,
        pool: Pool,
        layout: AdapterFormat,
        store: Store,
        table: Table,
    ) -> None:
        self._pool = pool
        self._layout = layout
        self._store = store
        self._table = table
        self._adapters: dict[str, _Resident] = {}
        self._pins: set[str] = set()
        self._errors: dict[str, LoramuxError] = {}
        self._pinned: list[str] = []
        self._num_leased_frames = 0
        self._load_s_per_byte = ASSUMED_LOAD_S_PER_BYTE
        self._jobs: queue.SimpleQueue[tuple[str, _Resident] | None] = queue.SimpleQueue()
        self._landed: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()
        self.on_loaded: Callable[[], None] = lambda: None
        self.num_loading = 0
        self.version = 0
        self.finished_loads: list[AdapterLoad] = []
        self.num_evicted = 0
        self._thread = threading.Thread(target=self._load_loop, name="adapter-loader", daemon=True)
        self._thread.start()

    # -- asked by the scheduler ------------------------------------------------------------------

    def num_frames(self, digest: str) -> int:
        """Frames the adapter needs. Raises LoramuxError if it cannot be served at all."""
        return self._layout.num_frames(self._store.header(digest).num_bytes)

    def is_resident(self, digest: str) -> bool:
        """True when rows may run on it."""
        resident = self._adapters.get(digest)
        return resident is not None and resident.slot is not None

    def is_loading(self, digest: str) -> bool:
        resident = self._adapters.get(digest)
        return resident is not None and resident.slot is None

    def load(self, digest: str) -> bool:
        """Begin to load ``digest`` unless it is here or on its way; False if no frames are to be
        had now. A failed load raises its reason, once; asking again tries again."""
        if (error := self._errors.pop(digest, None)) is not None:
            raise error
        if digest in self._adapters:
            return True
        packed = self._store.header(digest)
        frames = self._pool.obtain(self._layout.num_frames(packed.num_bytes), Owner.LOADING)
        if frames is None:
            return False
        resident = _Resident(packed, frames, pinned=digest in self._pins)
        self._adapters[digest] = resident
        self.num_loading += 1
        self._jobs.put((digest, resident))
        return True

    def lease(self, digest: str) -> int:
        """Hold the resident adapter for one row; its slot in the kernels' table."""
        resident = self._adapters[digest]
        assert resident.slot is not None
        if resident.leases == 0 and not resident.pinned:
            self._withdraw(digest, resident)
        resident.leases += 1
        return resident.slot

    def release(self, digest: str) -> None:
        """One row less on it; with none left it stays warm until its frames are needed."""
        resident = self._adapters[digest]
        resident.leases -= 1
        if resident.leases == 0 and not resident.pinned:
            self._offer(digest, resident)

    def slot(self, digest: str) -> int:
        """The kernels' number of a leased adapter."""
        slot = self._adapters[digest].slot
        assert slot is not None
        return slot

    # -- once a step -----------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what the loader finished since the last call."""
        while True:
            try:
                digest, error = self._landed.get_nowait()
            except queue.Empty:
                return
            self._land(digest, error)

    def _land(self, digest: str, error: Exception | None) -> None:
        resident = self._adapters[digest]
        self.num_loading -= 1
        if error is not None:
            del self._adapters[digest]
            self._pool.frames.give_back(resident.frames, Owner.LOADING)
            self._errors[digest] = (
                error
                if isinstance(error, LoramuxError)
                else AdapterLoadFailed(f"the adapter's packed file could not be read: {error}")
            )
            return
        self._pool.frames.transfer(resident.frames, Owner.LOADING, Owner.ADAPTER)
        packed = resident.packed
        resident.slot = self._table.add(
            slices=self._layout.slices(resident.frames),
            a_offset=packed.a_offset,
            b_offset=packed.b_offset,
            rank=packed.rank,
            scale=packed.scale,
            dtype=getattr(torch, packed.dtype),
        )
        self.version += 1
        seconds = time.monotonic() - resident.begun
        self._load_s_per_byte += 0.2 * (seconds / packed.num_bytes - self._load_s_per_byte)
        self.finished_loads.append(AdapterLoad(digest, seconds, packed.num_bytes))
        self._num_leased_frames += len(resident.frames)
        if not resident.pinned:
            self._offer(digest, resident)

    def _withdraw(self, digest: str, resident: _Resident) -> None:
        """It must not be evicted from now on."""
        self._num_leased_frames += len(resident.frames)
        self._pool.order.withdraw(digest)

    def _offer(self, digest: str, resident: _Resident) -> None:
        """It may be evicted from now on."""
        self._num_leased_frames -= len(resident.frames)
        self._pool.order.offer(
            digest,
            num_frames=len(resident.frames),
            cost_s=resident.packed.num_bytes * self._load_s_per_byte,
            evict=lambda: self._evict(digest),
        )

    def _evict(self, digest: str) -> None:
        resident = self._adapters.pop(digest)
        assert resident.slot is not None and resident.leases == 0
        self._table.remove(resident.slot)
        self._pool.frames.give_back(resident.frames, Owner.ADAPTER)
        self.num_evicted += 1
        self.version += 1

    # -- asked by an operator --------------------------------------------------------------------

    def pin(self, digest: str) -> bool:
        """Keep ``digest`` in the pool, loading it if need be; False if there is no room for it."""
        if digest in self._pins:
            return True
        if not self.load(digest):
            return False
        self._pins.add(digest)
        self._pinned = sorted(self._pins)
        resident = self._adapters[digest]
        if resident.slot is not None and resident.leases == 0:
            self._withdraw(digest, resident)
        resident.pinned = True
        return True

    def unpin(self, digest: str) -> None:
        """Let ``digest`` be evicted again."""
        if digest in self._pins:
            self._pins.remove(digest)
            self._pinned = sorted(self._pins)
        resident = self._adapters.get(digest)
        if resident is None or not resident.pinned:
            return
        resident.pinned = False
        if resident.slot is not None and resident.leases == 0:
            self._offer(digest, resident)

    def evict(self, digest: str) -> bool:
        """Drop a warm adapter now; False while it is leased, pinned or loading."""
        if digest not in self._adapters:
            return True
        if digest not in self._pool.order:
            return False
        self._pool.order.withdraw(digest)
        self._evict(digest)
        return True

    def resident(self) -> list[str]:
        """Digests rows may run on now."""
        return [digest for digest, r in self._adapters.items() if r.slot is not None]

    def pinned(self) -> list[str]:
        """Digests that stay in the pool; another list object after every change."""
        return self._pinned

    def num_leased_frames(self) -> int:
        """Frames of adapters that cannot be evicted now."""
        return self._num_leased_frames

    def close(self) -> None:
        """Stop the loader thread after the load it is at."""
        self._jobs.put(None)
        self._thread.join()

    def check(self) -> None:
        """Recount; an error here is a bug of ours."""
        held = sum(len(r.frames) for r in self._adapters.values() if r.slot is not None)
        assert self._pool.frames.count(Owner.ADAPTER) == held
        leased = sum(
            len(r.frames)
            for r in self._adapters.values()
            if r.slot is not None and (r.leases or r.pinned)
        )
        assert self._num_leased_frames == leased
        loading = sum(len(r.frames) for r in self._adapters.values() if r.slot is None)
        assert self._pool.frames.count(Owner.LOADING) == loading
        for digest, r in self._adapters.items():
            idle = r.slot is not None and r.leases == 0 and not r.pinned
            assert idle == (digest in self._pool.order), digest

    # -- the loader's thread ---------------------------------------------------------------------

    def _load_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            digest, resident = job
            error: Exception | None = None
            try:
                self._store.read_into(resident.packed, resident.frames)
            except Exception as problem:  # whatever it is, it is this adapter's and nobody else's
                error = problem
            self._landed.put((digest, error))
            self.on_loaded()
