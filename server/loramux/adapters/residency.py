"""Which adapters are in the pool: loading beside the step loop, leased while in use, then warm.

    absent ──load──> loading ──poll──> warm <──release/lease──> leased
      ^                 │ (failed, dropped)  │ (evicted)
      └─────────────────┴────────────────────┘

Threads bring the packed form into the frames; the step loop never waits for them. From the pinned
memory beside a GPU an adapter is loaded so fast that rows may run on it while its later layers are
still arriving. All methods are called by the engine's own thread, and none that a step calls goes
through all adapters.

An adapter with a basis (see ``basis``) is loaded after it and uses its frames. The basis is in the
pool under its own digest, as an adapter that no row names. Whatever keeps an adapter from being
evicted keeps its basis too; when a basis goes, those that are idle beside it go with it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence

from loramux.adapters.arrivals import Pace
from loramux.adapters.load_errors import LoadErrors
from loramux.adapters.loader import Load, Loader
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import Store
from loramux.adapters.resident import Resident, Table
from loramux.errors import LoramuxError
from loramux.memory.eviction import Frequency
from loramux.memory.formats import AdapterFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.metrics.picture import Event
from loramux.metrics.stats import AdapterLoad
from loramux.request import BASE_MODEL_ID

ASSUMED_LOAD_S_PER_BYTE = 1e-9
"""Until a first load is measured: what bringing one byte back costs (1 GB/s)."""
NEWEST_WEIGHT = 0.05
"""Of the newest load in the estimate of that."""
LOADING_SHARE = 0.25
"""Of the pool, at most so much is on its way at a time: frames that nobody computes with yet. One
adapter larger than that is loaded alone."""

EVICTED_FOR = ("kv", "adapter", "removed")
"""Why an adapter left: its frames were wanted for KV or for another adapter, or nobody may use it
any more."""
HISTORY = 48
"""The last comings and goings are remembered."""

PINNED_SHARE = 0.5
"""Of the pool, at most so much may be pinned: the rest stays for everybody."""


class Residency:
    """Adapters of one model in the pool, by digest; ``model_id`` tells those of several apart.

    ``on_loaded`` is called on the loader's thread when there is something to ``poll``. ``history``
    has what came and went last, with the time of ``time.monotonic``.
    """

    def __init__(
        self,
        pool: Pool,
        layout: AdapterFormat,
        store: Store,
        table: Table,
        *,
        model_id: int = BASE_MODEL_ID,
    ) -> None:
        self._pool = pool
        self.model_id = model_id
        self._layout = layout
        self._store = store
        self._table = table
        self._adapters: dict[str, Resident] = {}
        self._frequency = Frequency()
        self._pins: dict[str, int] = {}
        self._pinned: list[str] = []
        self.errors = LoadErrors()
        self._num_leased_frames = 0
        self._load_s_per_byte = ASSUMED_LOAD_S_PER_BYTE
        self._loader = Loader(store)
        self.pace = Pace()
        self._num_arriving_frames = 0
        self._most_loading = LOADING_SHARE * pool.frames.num_frames
        self._deferred = False
        self._bases: set[str] = set()
        self._asked: dict[str, str] = {}  # of this step's loads: the basis each waits for
        self._kept: list[str] = []  # bases that are held until the end of this step
        self._pins_waiting: dict[str, str] = {}  # pins to be loaded, and the basis each waits for
        self.num_loading = 0
        self.version = 0
        self.finished_loads: list[AdapterLoad] = []
        self.evictions = dict.fromkeys(EVICTED_FOR, 0)
        self.history: deque[tuple[float, Event]] = deque(maxlen=HISTORY)

    @property
    def on_loaded(self) -> Callable[[], None]:
        return self._loader.on_landed

    @on_loaded.setter
    def on_loaded(self, call: Callable[[], None]) -> None:
        self._loader.on_landed = call

    # -- asked by the scheduler ------------------------------------------------------------------

    def num_frames(self, *digests: str) -> int:
        """Frames that these adapters need, a basis being needed once. Raises LoramuxError if one of
        them cannot be served at all."""
        needed = {digest: None for name in digests for digest in (self._basis_of(name), name)}
        return sum(self._frames_of(digest) for digest in needed if digest is not None)

    def num_frames_to_load(self, digest: str) -> int:
        """Frames that are to be had before rows can run on it; raises as ``num_frames``."""
        wanted = (self._basis_of(digest), digest)
        return sum(self._frames_of(d) for d in wanted if d is not None and d not in self._adapters)

    def _basis_of(self, digest: str) -> str | None:
        basis = self._store.header(digest).basis
        if basis is not None:
            self._bases.add(basis)
        return basis

    def _frames_of(self, digest: str) -> int:
        return self._layout.num_frames(self._store.header(digest).num_bytes)

    def is_resident(self, digest: str) -> bool:
        """True when rows may run on it in the step that is being put together."""
        resident = self._adapters.get(digest)
        if resident is None or resident.slot is None:
            return False
        basis = resident.packed.basis
        if basis is not None and not self.is_resident(basis):
            return False
        return resident.arrival is None or resident.arrival.keeps_ahead(self.pace)

    def _is_here(self, digest: str) -> bool:
        """Whether it has its frames for good, though some of it may still arrive."""
        resident = self._adapters.get(digest)
        return resident is not None and resident.slot is not None

    def is_loading(self, digest: str) -> bool:
        resident = self._adapters.get(digest)
        return resident is not None and resident.slot is None

    def load(self, digest: str, *, ahead: bool = False) -> bool:
        """See that ``digest`` comes in, unless it is here or on its way; False if no frames are to
        be had for it now. ``ahead``: for a request that could not run yet anyway, so nothing is
        evicted that is worth more. When other loads have all they may take of the pool, neither
        this one nor those asked for after it begin before the next ``prioritize``, and the answer
        is True: ask again. So it is while the basis is on its way, which is loaded first, and for a
        moment after a load that found no memory beside the pool. A failed load, the basis's too,
        raises its reason, once; asking again tries again."""
        self.errors.throw(digest)
        if digest in self._adapters or self.errors.rests(digest):
            return True
        if (basis := self._basis_of(digest)) is not None:
            self._asked[digest] = basis
            if not self._is_here(basis) and not self.load(basis, ahead=ahead):
                return False
            if not self._is_here(basis):
                return True
            self.hold(basis)  # or another load of this step might take its frames
            self._kept.append(basis)
        if self._deferred:
            return True
        loading = self._pool.frames.count(Owner.LOADING) + self._num_arriving_frames
        if loading and loading + self._frames_of(digest) > self._most_loading:
            self._deferred = True
            return True
        return self._begin(digest, ahead=ahead)

    def _begin(self, digest: str, *, ahead: bool = False) -> bool:
        """Start the load of an adapter whose basis is here; False if there are no frames."""
        packed = self._store.header(digest)
        if packed.basis is not None:
            self.hold(packed.basis)
        num_frames = self._layout.num_frames(packed.num_bytes)
        below = math.inf
        if ahead:
            below = self._pool.order.worth(
                num_frames=num_frames, cost_s=self._cost_s(packed), uses=self._uses(digest)
            )
        frames = self._pool.obtain(num_frames, Owner.LOADING, below)
        if frames is None:
            if packed.basis is not None:
                self.release(packed.basis)
            return False
        after = self._store.given()
        arrival = self._store.begin(packed, frames, after)
        resident = Resident(packed, frames, pinned=digest in self._pins, arrival=arrival)
        self._adapters[digest] = resident
        if packed.basis is not None:
            self._adapters[packed.basis].dependents.add(digest)
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
        order = [d for name in wanted for d in (self._asked.get(name), name) if d is not None]
        keep = {*self._pins, *self._pins_waiting.values()} if self._pins_waiting else self._pins
        for load in self._loader.reorder(order, keep=keep):
            self.num_loading -= 1
            self._drop(load)
        self._asked.clear()
        for basis in self._kept:
            self.release(basis)
        self._kept.clear()

    def lease(self, digest: str) -> int:
        """Hold the resident adapter for one row; its slot in the kernels' table."""
        self._frequency.use(digest)
        resident = self._adapters[digest]
        resident.used_at = time.monotonic()
        if (basis := resident.packed.basis) is not None:
            self._frequency.use(basis)
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
        leased = [self._adapters[digest] for digest in dict.fromkeys(digests)]
        bases = dict.fromkeys(r.packed.basis for r in leased if r.packed.basis is not None)
        used = [*(self._adapters[basis] for basis in bases), *leased]
        arrivals = [resident.arrival for resident in used]
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
        for digest, basis in list(self._pins_waiting.items()):
            self._resume_pinned(digest, basis)

    def _drop(self, load: Load) -> None:
        """A load that came to nothing."""
        del self._adapters[load.packed.digest]
        self._pool.frames.give_back(load.frames, Owner.LOADING)
        if (basis := load.packed.basis) is not None:
            self._adapters[basis].dependents.remove(load.packed.digest)
            self.release(basis)

    def _give_up(self, load: Load, error: Exception) -> None:
        self._drop(load)
        self.errors.add(load.packed.digest, error)

    def _land(self, load: Load) -> None:
        packed = load.packed
        self.errors.loaded(packed.digest)
        resident = self._adapters[packed.digest]
        newest = load.work_s / packed.num_bytes
        self._load_s_per_byte += NEWEST_WEIGHT * (newest - self._load_s_per_byte)
        now = time.monotonic()
        seconds, size = now - load.asked, packed.num_bytes
        self.finished_loads.append(
            AdapterLoad(
                *(packed.digest, seconds, size), source="disk" if load.arrival is None else "host"
            )
        )
        came = Event("load", packed.digest, len(resident.frames), size, seconds)
        self.history.append((now, came))
        if load.arrival is not None:
            resident.arrival = None
            self._num_arriving_frames -= len(resident.frames)
            self.release(packed.digest)
            return
        self._enter(resident)
        if not resident.pinned:
            self._offer(packed.digest, resident)

    def _enter(self, resident: Resident) -> None:
        """From now on the kernels know it, and nobody may evict it."""
        digest = resident.packed.basis
        resident.enter(self._table, self._layout, self._adapters[digest] if digest else None)
        self._pool.frames.transfer(resident.frames, Owner.LOADING, Owner.ADAPTER)
        self.version += 1
        self._num_leased_frames += len(resident.frames)

    def _withdraw(self, digest: str, resident: Resident) -> None:
        """It must not be evicted from now on, nor its basis."""
        self._num_leased_frames += len(resident.frames)
        self._pool.order.withdraw((self.model_id, digest))
        if (basis := resident.packed.basis) is not None:
            self.hold(basis)

    def _offer(self, digest: str, resident: Resident) -> None:
        """It may be evicted from now on."""
        self._num_leased_frames -= len(resident.frames)
        self._pool.order.offer(
            (self.model_id, digest),
            num_frames=len(resident.frames),
            cost_s=self._cost_s(resident.packed),
            uses=self._uses(digest),
            evict=lambda: self._evict(digest, "kv" if self._pool.wanted_for_kv else "adapter"),
        )
        if (basis := resident.packed.basis) is not None:
            self.release(basis)

    def _cost_s(self, packed: PackedAdapter) -> float:
        return packed.num_bytes * self._load_s_per_byte

    def _uses(self, digest: str) -> float:
        # One for having been asked for, so that it counts for something before its first row.
        return self._frequency.of(digest) + 1.0

    def _evict(self, digest: str, reason: str) -> None:
        resident = self._adapters.pop(digest)
        assert resident.slot is not None and resident.leases == 0
        for dependent in list(resident.dependents):  # all idle, or this one would be held
            self._pool.order.withdraw((self.model_id, dependent))
            self._evict(dependent, reason)
        basis = resident.packed.basis
        if basis is not None and basis in self._adapters:
            self._adapters[basis].dependents.remove(digest)
        self._table.remove(resident.slot)
        self._pool.frames.give_back(resident.frames, Owner.ADAPTER)
        self.evictions[reason] += 1
        self.version += 1
        went = Event("evict", digest, len(resident.frames), resident.packed.num_bytes)
        self.history.append((time.monotonic(), went))

    # -- asked by an operator --------------------------------------------------------------------

    def pin(self, digest: str) -> bool:
        """Keep ``digest`` in the pool, loading it if need be; False if there is no room for it, or
        for one more that may not be evicted."""
        if digest in self._pins:
            return True
        self.errors.throw(digest)
        num_frames = self.num_frames(digest)
        if sum(self._pins.values()) + num_frames > PINNED_SHARE * self._pool.frames.num_frames:
            return False
        if digest not in self._adapters and not self._begin_pinned(digest):
            return False
        self._pins[digest] = num_frames
        self._pinned = sorted(self._pins)
        resident = self._adapters.get(digest)
        if resident is None:
            return True  # it begins when its basis is here
        if resident.slot is not None and resident.leases == 0:
            self._withdraw(digest, resident)
        resident.pinned = True
        return True

    def _begin_pinned(self, digest: str) -> bool:
        """Begin the load that nobody will ask for again, or that of its basis; False if there is no
        room for both."""
        basis = self._basis_of(digest)
        if basis is None or self._is_here(basis):
            return self._begin(digest)
        if self.num_frames_to_load(digest) > self._pool.num_available:
            return False
        if basis not in self._adapters and not self._begin(basis):
            return False
        self._pins_waiting[digest] = basis
        return True

    def _resume_pinned(self, digest: str, basis: str) -> None:
        """Go on once the basis is here, or its load has failed."""
        try:
            self.errors.throw(basis)
            if digest not in self._adapters:
                self._begin_pinned(digest)
            if digest in self._adapters:
                del self._pins_waiting[digest]
        except LoramuxError as problem:
            self.errors.add(digest, problem)
            del self._pins_waiting[digest]

    def unpin(self, digest: str) -> None:
        """Let ``digest`` be evicted again."""
        self._pins_waiting.pop(digest, None)
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
        if (self.model_id, digest) not in self._pool.order:
            return False
        self._pool.order.withdraw((self.model_id, digest))
        self._evict(digest, "removed")
        return True

    def take_evictions(self) -> dict[str, int]:
        """How many adapters left since the last call, by reason (``EVICTED_FOR``)."""
        evictions, self.evictions = self.evictions, dict.fromkeys(EVICTED_FOR, 0)
        return evictions

    def resident(self) -> list[str]:
        """Digests rows may run on now."""
        here = [digest for digest, r in self._adapters.items() if r.slot is not None]
        return [digest for digest in here if digest not in self._bases]

    def everything(self) -> ItemsView[str, Resident]:
        """All that has frames, or is on its way into them, by digest."""
        return self._adapters.items()

    def in_host(self) -> Mapping[str, int]:
        """Digests in the pinned memory beside a device, longest unused first, and their bytes."""
        return self._store.in_host()

    def pinned(self) -> list[str]:
        """Digests that stay in the pool; another list object after every change."""
        return self._pinned

    def num_leased_frames(self) -> int:
        """Frames of adapters that cannot be evicted now."""
        return self._num_leased_frames

    def close(self) -> None:
        """Stop the loader's threads after the loads they are at."""
        self._loader.close()

    def check(self) -> tuple[int, int]:
        """Recount; an error here is a bug of ours. Frames of adapters that are here, and of those
        that are loading."""
        held = sum(len(r.frames) for r in self._adapters.values() if r.slot is not None)
        leased = sum(
            len(r.frames)
            for r in self._adapters.values()
            if r.slot is not None and (r.leases or r.pinned)
        )
        assert self._num_leased_frames == leased
        arriving = sum(len(r.frames) for r in self._adapters.values() if r.arrival is not None)
        assert self._num_arriving_frames == arriving
        loading = sum(len(r.frames) for r in self._adapters.values() if r.slot is None)
        for digest, r in self._adapters.items():
            assert r.is_idle == ((self.model_id, digest) in self._pool.order), digest
            if r.packed.basis is not None:
                assert self._is_here(r.packed.basis), digest
                assert digest in self._adapters[r.packed.basis].dependents, digest
            if digest in self._bases:
                busy = sum(not self._adapters[d].is_idle for d in r.dependents)
                comes = r.arrival is not None
                assert r.leases == busy + self._kept.count(digest) + comes, digest
        return held, loading
