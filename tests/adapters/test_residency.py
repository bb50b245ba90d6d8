"""Adapters come and go beside the step loop, and the pool's books balance all the while."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters import load_errors, loader, residency
from loramux.adapters.residency import Residency
from loramux.errors import LoramuxError, Overloaded
from loramux.memory.formats import AdapterFormat, FrameShape
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool

FRAME = FrameShape(num_slices=2, slice_bytes=8)


@dataclass
class FakePacked:
    digest: str
    num_bytes: int
    basis: str | None = None
    dtype: str = "float32"
    middle_offset: Any = None
    a_offset: Any = None
    b_offset: Any = None
    rank: Any = None
    scale: Any = None
    vector_offset: Any = None
    token_ids_offset: Any = None
    token_rows_offset: Any = None
    num_token_rows: Any = None


@dataclass
class FakeStore:
    """Files that exist by being named; reads wait for ``gate``."""

    sizes: dict[str, int]
    bad: set[str] = field(default_factory=set)
    short: dict[str, int] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    begun: list[str] = field(default_factory=list)
    reads: list[tuple[str, list[int]]] = field(default_factory=list)

    def header(self, digest: str) -> Any:
        if digest not in self.sizes:
            raise LoramuxError("missing", code="adapter_load_failed")
        return FakePacked(digest, self.sizes[digest])

    def given(self) -> None:
        """Nothing is computed here."""

    def begin(self, packed: Any, frames: Sequence[int], after: None) -> None:
        """Nothing is near."""

    def waited_s(self) -> float:
        return 0.0

    def read_into(self, packed: Any, frames: Sequence[int], after: None) -> None:
        self.begun.append(packed.digest)
        assert self.gate.wait(5)
        self.reads.append((packed.digest, list(frames)))
        if packed.digest in self.bad:
            raise OSError("the disk says no")
        if self.short.get(packed.digest):
            self.short[packed.digest] -= 1
            raise torch.OutOfMemoryError("as planned")


class FakeTable:
    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = {}

    def add(self, *, slices: np.ndarray[Any, Any], **_: Any) -> int:
        slot = next(i for i in range(1_000) if i not in self.slots)
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
        frames = self.pool.frames
        books = frames.count(Owner.ADAPTER), frames.count(Owner.LOADING)
        assert self.residency.check() == books


def test_a_load_lands_where_the_table_says() -> None:
    bench = Bench(6, {"x": 40})
    assert bench.residency.load("x") and not bench.residency.is_resident("x")
    assert bench.pool.frames.count(Owner.LOADING) == 3
    bench.settle()
    ((_, frames),) = bench.store.reads
    (slices,) = bench.table.slots.values()
    assert slices == [f * 16 + s * 8 for f in frames for s in range(2)]
    bench.residency.close()


@pytest.mark.parametrize("times", [1, load_errors.MOST_TRIES - 1, load_errors.MOST_TRIES])
def test_a_load_without_memory_is_tried_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(load_errors, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bench = Bench(6, {"x": 40})
    bench.store.short["x"] = times
    for tries in range(1, times + 1):
        assert bench.residency.load("x")
        bench.settle()
        assert len(bench.store.reads) == tries and not bench.residency.is_resident("x")
        if tries < load_errors.MOST_TRIES:
            assert bench.residency.load("x") and not bench.residency.num_loading, "it rests"
            now[0] += load_errors.RETRY_S * 2**tries
    assert bench.residency.errors.num_shortages == times
    if times == load_errors.MOST_TRIES:
        with pytest.raises(Overloaded):
            bench.residency.load("x")
        bench.store.short["x"] = 1
        assert bench.residency.load("x")
        bench.settle()
        now[0] += load_errors.RETRY_S
        assert bench.residency.load("x"), "who asks later begins anew"
        bench.settle()
        assert bench.residency.is_resident("x")
    assert bench.residency.load("x")
    bench.settle()
    assert bench.residency.is_resident("x")
    bench.residency.evict("x")
    bench.store.short["x"] = load_errors.MOST_TRIES - 1
    for _ in range(load_errors.MOST_TRIES):
        now[0] += 100
        assert bench.residency.load("x"), "a load that went well is a new beginning"
        bench.settle()
    assert bench.residency.is_resident("x")
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


def test_pins_take_half_of_the_pool_at_most() -> None:
    bench = Bench(9, {**dict.fromkeys("abc", 32), "small": 16})
    assert bench.residency.pin("a") and bench.residency.pin("b")
    bench.settle()
    assert bench.residency.pin("a"), "it is already"
    assert bench.residency.pin("small") is False, "four of nine frames are pinned"
    assert bench.residency.pinned() == ["a", "b"] and not bench.residency.is_loading("small")
    bench.residency.unpin("a")
    assert bench.residency.pin("c") and bench.residency.pinned() == ["b", "c"]
    bench.settle()
    bench.residency.unpin("b")
    assert bench.residency.pin("small")
    bench.settle()
    bench.check()
    assert bench.pool.obtain(6, Owner.KV) is not None, "the other half is everybody's"
    bench.residency.close()


def test_it_is_told_for_whom_adapters_left() -> None:
    bench = Bench(4, {"a": 16, "b": 32, "c": 16, "d": 16})
    for digest in ("a", "b", "c"):
        assert bench.residency.load(digest)
        bench.settle()
    assert bench.residency.load("d")  # a gives way, asked for first
    bench.settle()
    assert bench.residency.take_evictions() == {"kv": 0, "adapter": 1, "removed": 0}
    assert bench.pool.obtain(3, Owner.KV) is not None
    left = bench.residency.resident()
    assert bench.residency.take_evictions() == {"kv": 3 - len(left), "adapter": 0, "removed": 0}
    assert left and all(bench.residency.evict(digest) for digest in left)
    assert bench.residency.take_evictions() == {"kv": 0, "adapter": 0, "removed": len(left)}
    assert not any(bench.residency.take_evictions().values())
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


def test_the_one_wanted_most_is_next_and_what_nobody_waits_for_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "NUM_THREADS", 1)
    bench = Bench(40, dict.fromkeys("abcdef", 16), gated=True)
    for name in "abcde":
        assert bench.residency.load(name)
    assert bench.residency.pin("f")
    while bench.store.begun != ["a"]:
        time.sleep(0.001)
    bench.residency.prioritize(["x", "e", "a", "c"])
    bench.check()
    assert [name for name in "abcdef" if bench.residency.is_loading(name)] == list("acef")
    assert bench.pool.frames.count(Owner.LOADING) == 4
    bench.store.gate.set()
    bench.settle()
    assert bench.store.begun == list("aecf")
    bench.residency.close()


def test_loads_take_no_more_than_their_share_of_the_pool() -> None:
    sizes = {**dict.fromkeys("abcd", 32), "large": 96, "small": 16}
    bench = Bench(20, sizes, gated=True)
    assert all(bench.residency.load(name) for name in "abcd")
    assert [name for name in "abcd" if bench.residency.is_loading(name)] == ["a", "b"]
    bench.residency.prioritize(list("abcd"))
    assert bench.residency.load("large") and bench.residency.load("small")
    assert bench.residency.num_loading == 2, "nobody overtakes the large one"
    bench.store.gate.set()
    bench.settle()
    bench.residency.prioritize(["large", "c"])
    assert bench.residency.load("large") and bench.residency.is_loading("large")
    bench.settle()
    bench.residency.close()


def test_fetching_ahead_evicts_nothing_that_is_worth_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency, "NEWEST_WEIGHT", 0.0)  # how fast loads are is not the question
    bench = Bench(3, {"hot": 16, "once": 16, "old": 16, "next": 16, "after": 16})
    for name in ("old", "once", "hot"):
        bench.residency.load(name)
        bench.settle()
        bench.residency.lease(name)
        bench.residency.release(name)
    for _ in range(5):
        bench.residency.lease("hot")
        bench.residency.release("hot")
    assert bench.residency.load("next", ahead=True) is False, "all were used once and lately"
    assert bench.residency.load("next") is True
    bench.settle()
    assert not bench.residency.is_resident("old")
    assert bench.residency.load("after", ahead=True) is True
    bench.settle()
    assert not bench.residency.is_resident("once")
    bench.residency.lease("next")
    bench.residency.hold("after")
    assert bench.residency.load("old", ahead=True) is False
    assert bench.residency.is_resident("hot") and bench.residency.is_resident("after")
    bench.residency.close()


class NoWalk(dict[str, Any]):
    """Falls over when somebody goes through all of it."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("a step went through all adapters")

    __iter__ = items = values = keys = _refuse


def test_what_a_step_does_is_the_same_however_many_are_resident() -> None:
    bench = Bench(400, {f"a{i}": 16 for i in range(300)} | {"cold": 16})
    for i in range(300):
        bench.residency.load(f"a{i}")
        if i % 50 == 49:
            bench.settle()
            bench.residency.prioritize([])
    many = bench.residency
    many._adapters = NoWalk(many._adapters)
    many.load("cold")
    many.prioritize(["cold"])
    while many.num_loading:
        many.poll()
    for name in ("a3", "cold"):
        many.lease(name)
    many.hold("a4")
    assert many.num_leased_frames() == 3
    for name in ("a3", "a4", "cold"):
        many.release(name)
    assert many.num_leased_frames() == 0 and many.pinned() == []
    many.close()


EVENTS = "load ahead wanted lease hold release pin unpin evict kv".split()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from("abcd")), max_size=60))
def test_any_order_of_events_leaves_balanced_books(events: list[tuple[str, str]]) -> None:
    bench = Bench(7, {"a": 16, "b": 32, "c": 48, "d": 16})
    leases = dict.fromkeys("abcd", 0)
    for event, name in events:
        if event in ("lease", "hold") and bench.residency.is_resident(name):
            getattr(bench.residency, event)(name)
            leases[name] += 1
        elif event == "release" and leases[name]:
            bench.residency.release(name)
            leases[name] -= 1
        elif event == "kv":
            frames = bench.pool.obtain(2, Owner.KV)
            if frames is not None:
                bench.pool.prefix.release(frames)
        elif event == "ahead":
            bench.residency.load(name, ahead=True)
        elif event == "wanted":
            bench.residency.prioritize([name])
        elif event in ("load", "pin", "unpin", "evict"):
            getattr(bench.residency, event)(name)
        bench.residency.poll()
        bench.check()
        assert all(bench.residency.is_resident(n) for n, count in leases.items() if count)
    bench.settle()
    bench.residency.close()
