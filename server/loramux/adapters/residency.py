"""Which adapters are in the pool: loading beside the step loop, leased while in use, then warm.

    absent ──load──> loading ──poll──> warm <──release/lease──> leased
      ^                 │ (failed, dropped)  │ (evicted)
      └─────────────────┴────────────────────┘

Threads bring the packed form into the frames; the step loop never waits for them. From the pinned
memory beside a GPU an adapter is loaded so fast that rows may run on it while its later layers are
still arriving. All methods are called by the engine's own thread, and none that a step calls goes
through all adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.arrivals import Arrival, Pace
from loramux.adapters.loader import Load, Loader
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import Store
from loramux.errors import AdapterLoadFailed, LoramuxError
from loramux.memory.eviction import Frequency
from loramux.memory.formats import AdapterFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.metrics.stats import AdapterLoad

ASSUMED_LOAD_S_PER_BYTE = 1e-9
"""Until a first load is measured: what bringing one byte back costs (1 GB/s)."""
NEWEST_WEIGHT = 0.05
"""Of the newest load in the estimate of that."""
LOADING_SHARE = 0.25
"""Of the pool, at most so much is on its way at a time: frames that nobody computes with yet. One
adapter larger than that is loaded alone."""

PINNED_SHARE = 0.5
"""Of the pool, at most so much may be pinned: the rest stays for everybody."""


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
        vector_offset: npt.NDArray[np.int64],
        token_ids_offset: npt.NDArray[np.int64],
        token_rows_offset: npt.NDArray[np.int64],
        num_token_rows: npt.NDArray[np.int32],
    ) -> int: ...
    def remove(self, slot: int) -> None: ...


@dataclass(slots=True)
class _Resident:
    packed: PackedAdapter
    frames: list[int]
    slot: int | None = None
    leases: int = 0
    pinned: bool = False
    arrival: Arrival | None = None


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
        self._frequency = Frequency()
        self._pins: dict[str, int] = {}
        self._pinned: list[str] = []
        self._errors: dict[str, LoramuxError] = {}
        self._num_leased_frames = 0
        self._load_s_per_byte = ASSUMED_LOAD_S_PER_BYTE
        self._loader = Loader(store)
        self.pace = Pace()
        self._num_arriving_frames = 0
        self._most_loading = LOADING_SHARE * pool.frames.num_frames
        self._deferred = False
        self.num_loading = 0
        self.version = 0
        self.finished_loads: list[AdapterLoad] = []
        self.num_evicted = 0

    @property
    def on_loaded(self) -> Callable[[], None]:
        return self._loader.on_landed

    @on_loaded.setter
    def on_loaded(self, call: Callable[[], None]) -> None:
        self._loader.on_landed = call

    # -- asked by the scheduler ------------------------------------------------------------------

    def num_frames(self, digest: str) -> int:
        """Frames the adapter needs. Raises LoramuxError if it cannot be served at all."""
        return self._layout.num_frames(self._store.header(digest).num_bytes)

    def is_resident(self, digest: str) -> bool:
        """True when rows may run on it in the step that is being put together."""
        resident = self._adapters.get(digest)
        if resident is None or resident.slot is None:
            return False
        return resident.arrival is None or resident.arrival.keeps_ahead(self.pace)

    def is_loading(self, digest: str) -> bool:
        resident = self._adapters.get(digest)
        return resident is not None and resident.slot is None

    def load(self, digest: str, *, ahead: bool = False) -> bool:
        """See that ``digest`` comes in, unless it is here or on its way; False if no frames are to
        be had for it now. ``ahead``: for a request that could not run yet anyway, so nothing is
        evicted that is worth more. When other loads have all they may take of the pool, neither
        this one nor those asked for after it begin before the next ``prioritize``, and the answer
        is True: ask again. A failed load raises its reason, once; asking again tries again."""
        if (error := self._errors.pop(digest, None)) is not None:
            raise error
        if digest in self._adapters or self._deferred:
            return True
        loading = self._pool.frames.count(Owner.LOADING) + self._num_arriving_frames
        if loading and loading + self.num_frames(digest) > self._most_loading:
            self._deferred = True
            return True
        return self._begin(digest, ahead=ahead)

    def _begin(self, digest: str, *, ahead: bool = False) -> bool:
        packed = self._store.header(digest)
        num_frames = self._layout.num_frames(packed.num_bytes)
        below = math.inf
        if ahead:
            below = self._pool.order.worth(
                num_frames=num_frames, cost_s=self._cost_s(packed), uses=self._uses(digest)
            )
        frames = self._pool.obtain(num_frames, Owner.LOADING, below)
        if frames is None:
            return False
        after = self._store.given()
        arrival = self._store.begin(packed, frames, after)
        resident = _Resident(packed, frames, pinned=digest in self._pins, arrival=arrival)
        self._adapters[digest] = resident
        self.num_loading += 1
        if arrival is not None:
            self._num_arriving_frames += num_frames
            resident.leases = 1
            self._enter(resident)
        self._loader.put(Load(packed, frames, after, arrival))
        return True

    def prioritize(self, wanted: Sequence[str]) -> None:
        """Loads that have not begun go in this order; those for nobody in it are dropped, unless
        an operator wants them. To be called once a step, after the loads were asked for."""
        self._deferred = False
        for load in self._loader.reorder(wanted, keep=self._pins):
            del self._adapters[load.packed.digest]
            self.num_loading -= 1
            self._pool.frames.give_back(load.frames, Owner.LOADING)

    def lease(self, digest: str) -> int:
        """Hold the resident adapter for one row; its slot in the kernels' table."""
        self._frequency.use(digest)
        return self.hold(digest)

    def hold(self, digest: str) -> int:
        """Keep the resident adapter in the pool until ``release``, though no row uses it."""
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

    def before_layer(self, digests: Iterable[str]) -> Callable[[int], None]:
        """To be called by a forward pass that uses ``digests`` before each of its layers, in
        order: the device waits there for what has not arrived."""
        arrivals = [self._adapters[digest].arrival for digest in dict.fromkeys(digests)]
        waits = [arrival.waits() for arrival in arrivals if arrival is not None]

        def wait(layer: int) -> None:
            if layer == 0:
                self.pace.starting()
            for before in waits:
                before(layer)

        return wait

    def take_waited_s(self) -> float:
        """Seconds the device stood still for arrivals since the last call, as far as known."""
        return self._store.waited_s()

    def slot(self, digest: str) -> int:
        """The kernels' number of a leased adapter."""
        slot = self._adapters[digest].slot
        assert slot is not None
        return slot

    # -- once a step -----------------------------------------------------------------------------

    def poll(self) -> None:
        """A step begins: take in what the loader finished since the last one."""
        self.pace.scheduling()
        for load in self._loader.landed():
            self.num_loading -= 1
            if load.error is None:
                self._land(load)
            else:
                self._give_up(load, load.error)

    def _give_up(self, load: Load, error: Exception) -> None:
        del self._adapters[load.packed.digest]
        self._pool.frames.give_back(load.frames, Owner.LOADING)
        if not isinstance(error, LoramuxError):
            error = AdapterLoadFailed(f"the adapter's packed file could not be read: {error}")
        self._errors[load.packed.digest] = error

    def _land(self, load: Load) -> None:
        packed = load.packed
        resident = self._adapters[packed.digest]
        newest = load.work_s / packed.num_bytes
        self._load_s_per_byte += NEWEST_WEIGHT * (newest - self._load_s_per_byte)
        seconds = time.monotonic() - load.asked
        self.finished_loads.append(AdapterLoad(packed.digest, seconds, packed.num_bytes))
        if load.arrival is not None:
            resident.arrival = None
            self._num_arriving_frames -= len(resident.frames)
            self.release(packed.digest)
            return
        self._enter(resident)
        if not resident.pinned:
            self._offer(packed.digest, resident)

    def _enter(self, resident: _Resident) -> None:
        """From now on the kernels know it, and nobody may evict it."""
        packed = resident.packed
        self._pool.frames.transfer(resident.frames, Owner.LOADING, Owner.ADAPTER)
        resident.slot = self._table.add(
            slices=self._layout.slices(resident.frames),
            a_offset=packed.a_offset,
            b_offset=packed.b_offset,
            rank=packed.rank,
            scale=packed.scale,
            dtype=getattr(torch, packed.dtype),
            vector_offset=packed.vector_offset,
            token_ids_offset=packed.token_ids_offset,
            token_rows_offset=packed.token_rows_offset,
            num_token_rows=packed.num_token_rows,
        )
        self.version += 1
        self._num_leased_frames += len(resident.frames)

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
            cost_s=self._cost_s(resident.packed),
            uses=self._uses(digest),
            evict=lambda: self._evict(digest),
        )

    def _cost_s(self, packed: PackedAdapter) -> float:
        return packed.num_bytes * self._load_s_per_byte

    def _uses(self, digest: str) -> float:
        # One for having been asked for, so that it counts for something before its first row.
        return self._frequency.of(digest) + 1.0

    def _evict(self, digest: str) -> None:
        resident = self._adapters.pop(digest)
        assert resident.slot is not None and resident.leases == 0
        self._table.remove(resident.slot)
        self._pool.frames.give_back(resident.frames, Owner.ADAPTER)
        self.num_evicted += 1
        self.version += 1

    # -- asked by an operator --------------------------------------------------------------------

    def pin(self, digest: str) -> bool:
        """Keep ``digest`` in the pool, loading it if need be; False if there is no room for it, or
        for one more that may not be evicted."""
        if digest in self._pins:
            return True
        if (error := self._errors.pop(digest, None)) is not None:
            raise error
        num_frames = self.num_frames(digest)
        if sum(self._pins.values()) + num_frames > PINNED_SHARE * self._pool.frames.num_frames:
            return False
        if digest not in self._adapters and not self._begin(digest):
            return False
        self._pins[digest] = num_frames
        self._pinned = sorted(self._pins)
        resident = self._adapters[digest]
        if resident.slot is not None and resident.leases == 0:
            self._withdraw(digest, resident)
        resident.pinned = True
        return True

    def unpin(self, digest: str) -> None:
        """Let ``digest`` be evicted again."""
        if digest in self._pins:
            del self._pins[digest]
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
        """Stop the loader's threads after the loads they are at."""
        self._loader.close()

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
        arriving = sum(len(r.frames) for r in self._adapters.values() if r.arrival is not None)
        assert self._num_arriving_frames == arriving
        loading = sum(len(r.frames) for r in self._adapters.values() if r.slot is None)
        assert self._pool.frames.count(Owner.LOADING) == loading
        for digest, r in self._adapters.items():
            idle = r.slot is not None and r.leases == 0 and not r.pinned
            assert idle == (digest in self._pool.order), digest
