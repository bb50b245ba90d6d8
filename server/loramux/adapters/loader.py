"""The threads that bring adapters into the pool, the one wanted most first."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from loramux.adapters.arrivals import Arrival, Mark
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import Store

NUM_THREADS = 2
"""From the page cache one thread copies as fast as two; from a disk two read half as fast again,
and an adapter that is cached need not wait for one that is not."""


@dataclass(slots=True)
class Load:
    """One adapter on its way into ``frames``, which are free ``after`` that; with an ``arrival`` it
    is under way already. ``work_s`` is what it took, without the wait for a thread."""

    packed: PackedAdapter
    frames: list[int]
    after: Mark | None = None
    arrival: Arrival | None = None
    asked: float = field(default_factory=time.monotonic)
    work_s: float = 0.0
    error: Exception | None = None


class Loader:
    """Loads that wait for a thread, in order, and those that are done.

    ``store.read_into`` runs on a thread of the loader, ``on_landed`` after it on the same thread;
    everything else is called by the engine's own. Arrivals have a thread to themselves: a load may
    be waiting for the memory that one of them still uses.
    """

    def __init__(self, store: Store) -> None:
        self.on_landed: Callable[[], None] = lambda: None
        self._store = store
        self._waiting: dict[str, Load] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._landed: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self._arriving: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in [
                *((f"adapter-loader-{i}", self._read_all) for i in range(NUM_THREADS)),
                ("adapter-arrivals", self._finish_all),
            ]
        ]
        for thread in self._threads:
            thread.start()

    def put(self, load: Load) -> None:
        """Begin ``load`` when those before it have begun."""
        if load.arrival is not None:
            self._arriving.put(load)
            return
        with self._changed:
            self._waiting[load.packed.digest] = load
            self._changed.notify()

    def reorder(self, wanted: Sequence[str], keep: Collection[str]) -> list[Load]:
        """Loads that have not begun yet go in the order of ``wanted``, then those in ``keep``. The
        others are dropped: nobody waits for them any more."""
        if not self._waiting:
            return []
        with self._changed:
            before, self._waiting = self._waiting, {}
            for digest in (*wanted, *(d for d in before if d in keep)):
                if (load := before.pop(digest, None)) is not None:
                    self._waiting[digest] = load
        return list(before.values())

    def landed(self) -> Iterator[Load]:
        """Loads that ended, well or not, since the last call."""
        while not self._landed.empty():
            yield self._landed.get()

    def close(self) -> None:
        """Stop the threads after the loads they are at."""
        self._arriving.put(None)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_all(self) -> None:
        while (load := self._next()) is not None:
            read = partial(self._store.read_into, load.packed, load.frames, load.after)
            self._do(load, read)

    def _finish_all(self) -> None:
        while (load := self._arriving.get()) is not None:
            assert load.arrival is not None
            self._do(load, load.arrival.finish)

    def _do(self, load: Load, work: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            work()
        except Exception as problem:  # whatever it is, it is this adapter's and nobody else's
            load.error = problem
        load.work_s = time.monotonic() - began
        self._landed.put(load)
        self.on_landed()

    def _next(self) -> Load | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            return self._waiting.pop(next(iter(self._waiting)))
