"""A basis in the pool: loaded before those that need it, held while one of them may run, never gone
while the kernels' table points at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.test_residency import FRAME, FakePacked, FakeStore, NoWalk
from tests.adapters.test_residency import Bench as PlainBench

from loramux.adapters import loader
from loramux.adapters.arrivals import Arrival
from loramux.adapters.residency import Residency
from loramux.errors import LoramuxError
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool

BASES = {"a": "P", "b": "P", "c": "Q", "d": None}
SIZES = {"P": 48, "Q": 30, "a": 10, "b": 20, "c": 16, "d": 32}


def content(digest: str, num_bytes: int) -> bytes:
    return np.random.default_rng(sum(digest.encode())).bytes(num_bytes)


class Packed(FakePacked):
    """Says who it is where a real one has ranks, so that the table knows."""

    def after(self, basis: FakePacked, num_bytes: int) -> FakePacked:
        assert basis.digest == self.basis
        assert num_bytes == -(-basis.num_bytes // FRAME.frame_bytes) * FRAME.frame_bytes
        return self


@dataclass
class Store(FakeStore):
    """Writes each stream's own bytes."""

    arena: Any = None

    def header(self, digest: str) -> Any:
        packed = super().header(digest)
        basis = BASES.get(digest[0])
        return Packed(digest, packed.num_bytes, basis=basis, rank=digest)

    def read_into(self, packed: Any, frames: Sequence[int], after: None) -> None:
        super().read_into(packed, frames, after)
        data = content(packed.digest, packed.num_bytes)
        for view in self.arena.views(frames, packed.num_bytes):
            view[:], data = data[: len(view)], data[len(view) :]


class Table:
    def __init__(self) -> None:
        self.entries: dict[int, tuple[str, np.ndarray[Any, Any]]] = {}

    def add(self, *, slices: np.ndarray[Any, Any], rank: str, **_: Any) -> int:  # type: ignore[type-arg]
        slot = next(i for i in range(1_000) if i not in self.entries)
        self.entries[slot] = rank, slices
        return slot

    def remove(self, slot: int) -> None:
        del self.entries[slot]


class Bench(PlainBench):
    """Freed frames are filled with NaN; whatever the table points at is looked at all the time."""

    def __init__(self, num_frames: int, *, gated: bool = False, **sizes: int) -> None:
        self.arena = Arena(num_frames, FRAME, torch.device("cpu"), poison=True)
        self.pool = Pool(num_frames, on_free=self.arena.freed)
        self.sizes = {**SIZES, **sizes}
        self.store: Any = Store(self.sizes, arena=self.arena)
        self.table: Any = Table()
        self.residency = Residency(self.pool, AdapterFormat(FRAME), self.store, self.table)
        if not gated:
            self.store.gate.set()

    def load(self, *digests: str) -> None:
        """Asked for every step, as the scheduler does, until they are there."""
        deadline = time.monotonic() + 5
        while not all(self.residency.is_resident(digest) for digest in digests):
            assert time.monotonic() < deadline
            self.residency.poll()
            for digest in digests:
                self.residency.load(digest)
            self.residency.prioritize(digests)
            self.check()

    def check(self) -> None:
        super().check()
        for digest, slices in self.table.entries.values():
            streams = [self.store.header(digest).basis, digest]
            at = 0
            for stream in filter(None, streams):
                data = content(stream, self.sizes[stream])
                count = -(-len(data) // FRAME.frame_bytes) * FRAME.num_slices
                places = slices[at : at + count].tolist()
                there = b"".join(
                    self.arena.data[p : p + FRAME.slice_bytes].numpy().tobytes() for p in places
                )
                assert there[: len(data)] == data, f"{digest} points at what is not {stream}'s"
                at += count
            assert at == len(slices)

    def frames(self) -> int:
        return self.pool.frames.count(Owner.ADAPTER)


@pytest.fixture
def bench() -> Any:
    bench = Bench(20)
    yield bench
    bench.residency.close()


def test_ten_on_one_basis_take_it_once() -> None:
    names = [f"a{i}" for i in range(10)]
    bench = Bench(20, **dict.fromkeys(names, 10))
    assert bench.residency.num_frames("a0") == 4
    assert bench.residency.num_frames(*names) == bench.residency.num_frames(*names, *names) == 13
    assert bench.residency.num_frames_to_load("a0") == 4
    bench.load("a0")
    assert bench.residency.num_frames_to_load("a0") == 0
    assert bench.residency.num_frames_to_load("a1") == 1
    bench.load(*names)
    assert bench.frames() == 3 + 10 and bench.store.begun.count("P") == 1
    assert sorted(bench.residency.resident()) == sorted(names), "nobody runs on a basis"
    lists = [slices for name, slices in bench.table.entries.values() if name != "P"]
    assert all((slices[:6] == lists[0][:6]).all() for slices in lists)
    assert len({int(slices[6]) for slices in lists}) == 10
    bench.residency.close()


def test_what_keeps_an_adapter_keeps_its_basis(bench: Bench) -> None:
    bench.load("a", "b", "c")
    assert bench.residency.num_leased_frames() == 0 and bench.pool.num_available == 20
    bench.residency.lease("a")
    assert bench.residency.num_leased_frames() == 3 + 1
    assert bench.pool.num_available == 16 and not bench.residency.evict("P")
    bench.residency.lease("b")
    bench.residency.release("a")
    assert bench.pool.obtain(17, Owner.KV) is None and bench.residency.num_leased_frames() == 5
    assert bench.pool.obtain(15, Owner.KV) is not None
    assert bench.residency.resident() == ["b"]
    bench.check()
    bench.residency.release("b")
    assert bench.residency.num_leased_frames() == 0
    bench.check()


def test_everything_idle_can_be_had_at_once(bench: Bench) -> None:
    """A basis counts as idle when all on it are, or its frames would be nobody's to give."""
    bench.load("a", "b", "c", "d")
    assert bench.pool.num_available == 20
    assert bench.pool.obtain(20, Owner.KV) is not None
    assert bench.residency.resident() == [] and not bench.table.entries
    bench.check()


def test_a_basis_that_goes_takes_those_on_it_along(bench: Bench) -> None:
    bench.load("a", "b", "c")
    assert bench.residency.evict("P")
    assert bench.residency.resident() == ["c"] and sum(bench.residency.evictions.values()) == 3
    bench.check()
    bench.load("b")
    assert bench.residency.evict("b") and bench.frames() == 3 + 2 + 1
    bench.check()


def test_a_basis_loads_before_and_for_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NUM_THREADS", 1)
    bench = Bench(60, gated=True)
    assert bench.residency.load("d")
    while bench.store.begun != ["d"]:
        time.sleep(0.001)
    for step in (["c", "a"], ["a", "c"], ["b"], ["b", "c"]):
        for name in step:
            assert bench.residency.load(name)
        bench.residency.prioritize(step)
        bench.check()
        wanted = [BASES[name] for name in step]
        assert [p for p in "PQ" if bench.residency.is_loading(p)] == sorted(filter(None, wanted))
        assert list(bench.residency._loader._waiting) == wanted
        assert not bench.residency.is_loading("a")
    bench.store.gate.set()
    bench.load("b", "c")
    assert bench.store.begun[:3] == ["d", "P", "Q"]
    bench.residency.close()


def test_a_basis_waited_for_is_not_dropped_when_its_turn_is_put_off() -> None:
    """One too large for this step comes first in line: what was begun for others stays."""
    bench = Bench(40, gated=True, d=20 * FRAME.frame_bytes, Q=10 * FRAME.frame_bytes)
    for name in ("c", "a"):
        assert bench.residency.load(name)
    bench.residency.prioritize(["c", "a"])
    loading = [p for p in "PQ" if bench.residency.is_loading(p)]
    for name in ("d", "c", "a"):
        assert bench.residency.load(name)
    assert not bench.residency.is_loading("d"), "put off"
    bench.residency.prioritize(["d", "c", "a"])
    assert [p for p in "PQ" if bench.residency.is_loading(p)] == loading
    bench.store.gate.set()
    bench.load("a", "c")
    bench.residency.close()


def test_a_basis_stays_while_the_step_goes_on_that_asked_for_it(bench: Bench) -> None:
    bench.load("a")
    assert bench.residency.evict("a")
    bench.residency._most_loading = 0
    bench.residency.load("d")
    assert bench.residency.load("b") and not bench.residency.is_loading("b"), "put off"
    assert bench.pool.obtain(18, Owner.KV) is None
    assert bench.pool.obtain(15, Owner.KV) is not None
    bench.check()
    bench.residency.prioritize(["b"])
    bench.settle()
    assert bench.pool.num_available == 3 + 2
    bench.check()


@pytest.mark.parametrize("broken", ["P", "a"])
def test_a_basis_that_fails_is_the_failure_of_those_on_it(bench: Bench, broken: str) -> None:
    bench.store.bad.add(broken)
    with pytest.raises(LoramuxError, match="the disk says no"):
        bench.load("a")
    bench.check()
    assert bench.pool.num_available == 20
    bench.store.bad.clear()
    bench.load("a")


def test_a_missing_basis_is_told_at_once(bench: Bench) -> None:
    del bench.store.sizes["P"]
    for ask in (bench.residency.num_frames, bench.residency.load, bench.residency.pin):
        with pytest.raises(LoramuxError, match="missing"):
            ask("a")
    bench.check()


def wait_for(bench: Bench, digest: str) -> None:
    deadline = time.monotonic() + 5
    while not bench.residency.is_resident(digest):
        assert time.monotonic() < deadline
        bench.residency.poll()
        bench.residency.prioritize([])
        bench.check()


def test_a_pin_brings_the_basis_and_then_the_adapter_though_nobody_asks_again(
    bench: Bench,
) -> None:
    assert bench.residency.pin("a") and bench.residency.pin("b")
    assert bench.residency.pinned() == ["a", "b"]
    wait_for(bench, "a")
    wait_for(bench, "b")
    assert bench.residency.num_leased_frames() == 3 + 1 + 2
    assert bench.pool.obtain(15, Owner.KV) is None
    bench.residency.unpin("a")
    bench.residency.unpin("b")
    assert bench.pool.obtain(20, Owner.KV) is not None
    bench.check()


def test_the_basis_of_a_pin_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NUM_THREADS", 1)
    bench = Bench(20, gated=True)
    assert bench.residency.load("d")
    while bench.store.begun != ["d"]:
        time.sleep(0.001)
    assert bench.residency.pin("a") and bench.residency.load("c")
    bench.residency.prioritize([])
    assert bench.residency.is_loading("P") and not bench.residency.is_loading("Q")
    bench.residency.unpin("a")
    bench.residency.prioritize([])
    assert not bench.residency.is_loading("P"), "nobody wants it any more"
    bench.store.gate.set()
    bench.settle()
    bench.residency.close()


class Slow(Store):
    """P is near and said to come in an hour; what is behind it is read from the disk at once."""

    def begin(self, packed: Any, frames: Sequence[int], after: None) -> Any:
        if packed.digest != "P":
            return None
        self.read_into(packed, frames, None)
        self.come, self.held = threading.Event(), []
        marks: Any = ["first", "last"]
        lands = np.array([time.monotonic() + 3600] * 2)
        arrival = Arrival(marks, lands, np.arange(2), hold=self.held.append, done=lambda: None)
        arrival.finish = lambda: assert_(self.come.wait(20))  # type: ignore[method-assign]
        return arrival


def assert_(true: bool) -> None:
    assert true


def test_rows_wait_for_the_basis_though_their_own_part_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(20)
    bench.store.__class__ = Slow
    monkeypatch.setattr(bench.residency, "_most_loading", 20)
    assert bench.residency.load("a") and bench.residency.num_loading == 2
    bench.residency.prioritize(["a"])
    while bench.residency.num_loading == 2:
        bench.residency.poll()
    bench.check()
    assert bench.residency._adapters["a"].slot is not None
    assert not bench.residency.is_resident("a"), "its basis is an hour away"
    bench.residency.pace._lead_s = 7200
    assert bench.residency.is_resident("a")
    bench.residency.lease("a")
    before_layer = bench.residency.before_layer(["a", "a"])
    before_layer(0)
    assert bench.store.held == ["first"]
    before_layer(1)
    assert bench.store.held == ["first", "last"]
    bench.store.come.set()
    bench.settle()
    bench.residency.close()


def test_a_pin_whose_basis_fails(bench: Bench) -> None:
    bench.store.bad.add("P")
    assert bench.residency.pin("a")
    bench.settle()
    with pytest.raises(LoramuxError, match="the disk says no"):
        bench.residency.load("a")
    bench.store.bad.clear()
    bench.load("a")
    assert bench.pool.obtain(17, Owner.KV) is None, "it is pinned still"
    bench.check()


def test_a_pin_with_no_room_for_both_is_refused() -> None:
    bench = Bench(3)
    assert bench.residency.pin("a") is False and bench.residency.pinned() == []
    assert bench.pool.frames.num_free == 3
    bench.check()
    bench.residency.close()


def test_a_step_does_the_same_however_many_share_a_basis() -> None:
    names = [f"a{i}" for i in range(200)]
    bench = Bench(800, **dict.fromkeys([*names, "a-cold"], 10))
    bench.load(*names)
    residency = bench.residency
    residency._adapters = NoWalk(residency._adapters)
    residency.load("a-cold")
    residency.prioritize(["a-cold"])
    while residency.num_loading:
        residency.poll()
    residency.lease("a-cold")
    residency.before_layer(["a-cold"])
    residency.release("a-cold")
    assert residency.num_leased_frames() == 0
    residency.close()


EVENTS = "load ahead wanted lease hold release pin unpin evict kv all_kv bad good settle".split()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from("abcdPQ")), max_size=70))
def test_no_order_of_events_leaves_the_table_pointing_at_what_is_gone(
    events: list[tuple[str, str]],
) -> None:
    bench = Bench(9)
    leases = dict.fromkeys("abcd", 0)
    for event, name in events:
        adapter = name if name in BASES else "a"
        try:
            if event in ("lease", "hold") and bench.residency.is_resident(adapter):
                getattr(bench.residency, event)(adapter)
                leases[adapter] += 1
            elif event == "release" and leases[adapter]:
                bench.residency.release(adapter)
                leases[adapter] -= 1
            elif event in ("kv", "all_kv"):
                count = 2 if event == "kv" else bench.pool.num_available
                frames = bench.pool.obtain(count, Owner.KV)
                assert frames is not None or event == "kv", "what is idle can be had"
                if frames is not None:
                    bench.pool.prefix.release(frames)
            elif event == "ahead":
                bench.residency.load(adapter, ahead=True)
            elif event == "wanted":
                bench.residency.prioritize([adapter])
            elif event == "evict":
                bench.residency.evict(name)
            elif event == "bad":
                bench.store.bad.add(name)
            elif event == "good":
                bench.store.bad.discard(name)
            elif event == "settle":
                bench.settle()
            elif event in ("load", "pin", "unpin"):
                getattr(bench.residency, event)(adapter)
        except LoramuxError as error:
            assert bench.store.bad or "the disk says no" in error.message
        bench.residency.poll()
        bench.check()
        assert all(bench.residency.is_resident(n) for n, count in leases.items() if count)
    bench.settle()
    bench.residency.close()
