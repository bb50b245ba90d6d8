"""Adapters come and go beside the step loop, and the pool's books balance all the while."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters.residency import Residency
from loramux.errors import LoramuxError
from loramux.memory.formats import AdapterFormat, FrameShape
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool

FRAME = FrameShape(num_slices=2, slice_bytes=8)


@dataclass
class FakePacked:
    digest: str
    num_bytes: int
    dtype: str = "float32"
    a_offset: Any = None
    b_offset: Any = None
    rank: Any = None
    scale: Any = None


@dataclass
class FakeStore:
    """Files that exist by being named; reads wait for ``gate``."""

    sizes: dict[str, int]
    bad: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    reads: list[tuple[str, list[int]]] = field(default_factory=list)

    def header(self, digest: str) -> Any:
        if digest not in self.sizes:
            raise LoramuxError("missing", code="adapter_load_failed")
        return FakePacked(digest, self.sizes[digest])

    def read_into(self, packed: Any, frames: Sequence[int]) -> None:
        assert self.gate.wait(5)
        self.reads.append((packed.digest, list(frames)))
        if packed.digest in self.bad:
            raise OSError("the disk says no")


class FakeTable:
    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = {}

    def add(self, *, slices: np.ndarray[Any, Any], **_: Any) -> int:
        slot = next(i for i in range(100) if i not in self.slots)
        self.slots[slot] = slices.tolist()
        return slot

    def remove(self, slot: int) -> None:
        del self.slots[slot]


class Bench:
    def __init__(self, num_frames: int, sizes: dict[str, int], *, gated: bool = False) -> None:
        self.pool = Pool(num_frames)
        self.store = FakeStore(sizes)
        self.table = FakeTable()
        self.residency = Residency(self.pool, AdapterFormat(FRAME), self.store, self.table)
        if not gated:
            self.store.gate.set()

    def settle(self) -> None:
        """Wait for every load under way."""
        deadline = time.monotonic() + 5
        while self.residency.num_loading:
            assert time.monotonic() < deadline
            self.residency.poll()
            time.sleep(0.001)
        self.check()

    def check(self) -> None:
        self.pool.check()
        self.residency.check()


def test_a_load_lands_where_the_table_says() -> None:
    bench = Bench(6, {"x": 40})
    assert bench.residency.load("x") and not bench.residency.is_resident("x")
    assert bench.pool.frames.count(Owner.LOADING) == 3
    bench.settle()
    ((_, frames),) = bench.store.reads
    (slices,) = bench.table.slots.values()
    assert slices == [f * 16 + s * 8 for f in frames for s in range(2)]
    bench.residency.close()


def test_loading_does_not_make_the_caller_wait() -> None:
    bench = Bench(6, {"x": 16}, gated=True)
    began = threading.Event()
    bench.residency.on_loaded = began.set
    assert bench.residency.load("x")
    bench.residency.poll()
    assert bench.residency.is_loading("x")
    bench.store.gate.set()
    assert began.wait(5), "the engine is woken when a load lands"
    bench.settle()
    assert bench.residency.is_resident("x")
    bench.residency.close()


def test_leased_and_pinned_adapters_are_never_evicted() -> None:
    bench = Bench(4, {"leased": 16, "pinned": 16, "warm": 16, "new": 16, "one more": 16})
    for name in ("leased", "pinned", "warm", "new"):
        assert bench.residency.load(name)
    bench.settle()
    bench.residency.lease("leased")
    assert bench.residency.pin("pinned")
    assert bench.residency.load("one more")
    bench.settle()
    assert {"leased", "pinned", "one more"} <= set(bench.residency.resident())
    assert bench.pool.obtain(3, Owner.KV) is None
    bench.residency.release("leased")
    bench.residency.unpin("pinned")
    assert bench.pool.obtain(4, Owner.KV) is not None
    assert bench.residency.resident() == [] and bench.table.slots == {}
    bench.check()
    bench.residency.close()


def test_a_failed_load_is_told_once_and_can_be_tried_again() -> None:
    bench = Bench(4, {"x": 16})
    bench.store.bad.add("x")
    assert bench.residency.load("x")
    bench.settle()
    assert bench.pool.frames.num_free == 4
    with pytest.raises(LoramuxError, match="the disk says no"):
        bench.residency.load("x")
    bench.store.bad.clear()
    assert bench.residency.load("x")
    bench.settle()
    assert bench.residency.is_resident("x")
    bench.residency.close()


def test_no_room_is_an_answer() -> None:
    bench = Bench(2, {"x": 16, "large": 48})
    assert bench.residency.load("x")
    bench.settle()
    bench.residency.lease("x")
    assert bench.residency.load("large") is False
    assert bench.residency.pin("large") is False
    assert bench.residency.pinned() == []
    bench.check()
    bench.residency.close()


def test_evict_drops_warm_adapters_only() -> None:
    bench = Bench(4, {"x": 16})
    bench.residency.load("x")
    bench.settle()
    bench.residency.lease("x")
    assert bench.residency.evict("x") is False
    bench.residency.release("x")
    assert bench.residency.evict("x") is True
    assert bench.pool.frames.num_free == 4
    bench.check()
    bench.residency.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("load lease release pin unpin evict kv".split()),
                          st.sampled_from("abcd")), max_size=60))  # fmt: skip
def test_any_order_of_events_leaves_balanced_books(events: list[tuple[str, str]]) -> None:
    bench = Bench(7, {"a": 16, "b": 32, "c": 48, "d": 16})
    leases = dict.fromkeys("abcd", 0)
    for event, name in events:
        if event == "lease" and bench.residency.is_resident(name):
            bench.residency.lease(name)
            leases[name] += 1
        elif event == "release" and leases[name]:
            bench.residency.release(name)
            leases[name] -= 1
        elif event == "kv":
            frames = bench.pool.obtain(2, Owner.KV)
            if frames is not None:
                bench.pool.prefix.release(frames)
        elif event in ("load", "pin", "unpin", "evict"):
            getattr(bench.residency, event)(name)
        bench.residency.poll()
        bench.check()
        assert all(bench.residency.is_resident(n) for n, count in leases.items() if count)
    bench.settle()
    bench.residency.close()
