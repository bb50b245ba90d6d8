"""Joining a step before the adapter has arrived: the forecast on a clock of the test's own, and the
waits that make a wrong forecast slow, never wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.fake_device import FakeDevice

from loramux.adapters import staging
from loramux.adapters.arrivals import MARGIN, Arrival, Link, Pace
from loramux.adapters.pack import Layout
from loramux.adapters.residency import Residency
from loramux.adapters.staging import CudaDevice, TieredStore
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat, FrameShape
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.wire import TABLE_MODULES


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_transfers_queue_up_behind_each_other() -> None:
    clock = Clock()
    link = Link(clock)
    link.s_per_byte = 0.5 / MARGIN
    assert link.lands([2, 4]).tolist() == [101.0, 103.0]
    clock.now = 102.0
    assert link.lands([2]).tolist() == [104.0]
    clock.now = 110.0
    assert link.lands([2]).tolist() == [111.0]


def test_the_rate_follows_what_transfers_took() -> None:
    link = Link(Clock())
    for _ in range(60):
        link.took(1000, 2.0)
    assert link.s_per_byte == pytest.approx(0.002, rel=1e-3)


def nothing_else(layers: int) -> list[npt.NDArray[Any]]:
    """A layout's last fields, for an adapter of pairs alone."""
    vectors = np.full((layers, len(TABLE_MODULES), 3), -1, np.int64)
    return [vectors, np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int32)]


def arrival(lands: Sequence[float], blocks: Sequence[int], holds: list[Any]) -> Arrival:
    return Arrival(
        [SimpleNamespace(name=i) for i in range(len(lands))],  # type: ignore[misc]
        np.array(lands),
        np.array(blocks),
        hold=lambda mark: holds.append(mark.name),  # type: ignore[attr-defined]
        done=lambda: None,
    )


def pace(clock: Clock, lead_s: float, step_s: float) -> Pace:
    """As after a step that took so long, at the beginning of the next."""
    pace = Pace(clock)
    pace.scheduling()
    clock.now += lead_s
    pace.starting()
    pace.took(step_s)
    pace.scheduling()
    return pace


@pytest.mark.parametrize(
    ("lands", "ahead"),
    [
        ([101.5, 103.5], True),
        ([101.6, 103.5], False),
        ([101.5, 103.6], False),
        ([99.0, 99.0], True),
    ],
)
def test_every_layer_has_to_land_before_it_is_reached(lands: list[float], ahead: bool) -> None:
    """Layers 0 and 1 need block 0, 2 and 3 block 1; they are reached at 101.5, 102.5, 103.5..."""
    clock = Clock()
    at = pace(clock, lead_s=0.75, step_s=4.0)
    assert clock.now + 0.75 == 101.5
    assert arrival(lands, [0, 0, 1, 1], []).keeps_ahead(at) is ahead


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_who_joins_never_waits_while_the_link_keeps_its_rate(data: st.DataObject) -> None:
    """Blocks and layers on one time line: a link at most MARGIN slower than forecast, a forward
    pass no faster than the last one."""
    clock = Clock()
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=8), label="blocks")
    needs = sorted(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=9)))
    at = pace(clock, data.draw(st.floats(0, 20)), data.draw(st.floats(0, 200)))
    link = Link(clock)
    link.s_per_byte = 1.0
    arriving = arrival(link.lands(sizes).tolist(), needs, [])
    begun = clock.now
    clock.now += data.draw(st.floats(0, 100), label="later")
    at.scheduling()
    if not arriving.keeps_ahead(at):
        return
    real = data.draw(st.floats(0.1, MARGIN), label="real seconds a byte")
    landed = begun + np.cumsum(sizes) * real
    slower = data.draw(st.floats(1, 3), label="slower layers")
    start = at.reaches(len(needs))[0]
    reached = start + (at.reaches(len(needs)) - start) * slower
    assert (landed[needs] <= reached + 1e-9).all()


def test_a_forward_pass_waits_once_for_each_block_it_comes_to() -> None:
    holds: list[Any] = []
    arriving = arrival([0.0] * 4, [0, 0, 2, 3, 3], holds)
    before = arriving.waits()
    for layer in range(5):
        before(layer)
    assert holds == [0, 2, 3]
    holds.clear()
    arriving.waits()(4)
    assert holds == [3], "the last layer's block is there when all are"


def test_where_each_layer_ends_in_the_stream() -> None:
    rank = np.zeros((5, len(TABLE_MODULES)), np.int32)
    a_offset, b_offset = (
        np.zeros((5, len(TABLE_MODULES)), np.int64),
        np.zeros((5, len(TABLE_MODULES)), np.int64),
    )
    end, ends = 0, []
    for layer, modules in enumerate([(0, 2, 3), (), (6,), (), (0, 1)]):
        for module in modules:
            rank[layer, module] = 2
            a_offset[layer, module], b_offset[layer, module] = end, end + 32
            end += 96
        ends.append(end)
    scale = rank.astype(np.float32)
    none = np.full_like(a_offset, -1)
    layout = Layout("float32", 16, end, a_offset, b_offset, none, rank, scale, *nothing_else(5))
    assert layout.layer_ends().tolist() == ends
    # With a basis only the middles are the stream's own.
    middles = np.where(rank > 0, a_offset, -1)
    zeros = np.zeros_like(a_offset)
    layout = Layout("float32", 16, end, zeros, zeros, middles, rank, scale, *nothing_else(5))
    assert layout.layer_ends().tolist() == ends


TABLE_FIELDS = (
    *("a_offset", "b_offset", "middle_offset", "rank", "scale", "vector_offset"),
    *("token_ids_offset", "token_rows_offset", "num_token_rows"),
)
FRAME = FrameShape(num_slices=4, slice_bytes=64)
LAYERS = 4


def packed(name: str) -> Any:
    """Four layers of 256, 0, 640 and 128 bytes."""
    sizes = [64, 0, 160, 32]
    rank = np.array([[size > 0] + [0] * (len(TABLE_MODULES) - 1) for size in sizes], np.int32)
    a_offset = np.zeros((4, len(TABLE_MODULES)), np.int64)
    a_offset[:, 0] = np.cumsum([0, *sizes[:-1]])
    scale = rank.astype(np.float32)
    none = np.full_like(a_offset, -1)
    layout = Layout("float32", 16, 256, a_offset, a_offset, none, rank, scale, *nothing_else(4))
    return SimpleNamespace(
        digest=name,
        basis="basis" if name.startswith("of basis") else None,
        after=lambda basis, num_bytes: layout,
        num_bytes=layout.num_bytes,
        num_elems=256,
        dtype="float32",
        num_slices=layout.num_slices,
        layer_ends=layout.layer_ends,
        **{key: getattr(layout, key) for key in TABLE_FIELDS},
    )


class Files:
    def __init__(self) -> None:
        self.num_reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def header(self, digest: str) -> Any:
        return packed(digest)

    def read(self, adapter: Any, views: Sequence[memoryview]) -> None:
        assert self.gate.wait(20)
        self.num_reads += 1
        data = content(adapter.digest)
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]


def content(name: str) -> bytes:
    return np.random.default_rng(sum(name.encode())).bytes(packed(name).num_bytes)


class Table:
    def add(self, **_: Any) -> int:
        return 0

    def remove(self, slot: int) -> None:
        pass


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        monkeypatch.setattr(staging, "BLOCK_BYTES", 2 * FRAME.slice_bytes)
        self.device = FakeDevice(seed)
        self.files = Files()
        self.pool = Pool(16)
        self.arena = Arena(16, FRAME, torch.device("cpu"), poison=True)
        files: Any = self.files
        self.store = TieredStore(files, self.arena, self.device, 4096)
        self.residency = Residency(self.pool, AdapterFormat(FRAME), self.store, Table())

    def settle(self) -> None:
        deadline = time.monotonic() + 10
        while self.residency.num_loading:
            assert time.monotonic() < deadline
            self.residency.poll()
            self.check()

    def check(self) -> None:
        self.pool.check()
        frames = self.pool.frames
        books = frames.count(Owner.ADAPTER), frames.count(Owner.LOADING)
        assert self.residency.check() == books

    def near(self, name: str) -> None:
        """Loaded from disk and evicted again: in the host tier only."""
        assert self.residency.load(name)
        assert not self.residency.is_resident(name), "from a disk it comes when it comes"
        self.settle()
        assert self.residency.evict(name)
        self.arena.data.fill_(0xFF)


@pytest.mark.parametrize("seed", range(6))
def test_each_layer_finds_its_weights_however_late_they_come(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    bench = Bench(monkeypatch, seed)
    bench.near("x")
    bench.device.gate.clear()
    assert bench.residency.load("x")
    bench.check()
    bench.residency.lease("x")
    (frames,) = (r.frames for r in bench.residency._adapters.values())
    seen: list[bytes] = []
    before_layer = bench.residency.before_layer(["x", "x"])
    for layer in range(LAYERS):
        before_layer(layer)

        def read() -> None:
            whole = b"".join(bench.arena.frame_data(frame).numpy().tobytes() for frame in frames)
            seen.append(whole)

        bench.device.computing._do(read)
    bench.device.work_until(lambda: len(seen) == LAYERS)
    for end, whole in zip(packed("x").layer_ends() * 4, seen, strict=True):
        assert whole[:end] == content("x")[:end]
    assert bench.files.num_reads == 1
    bench.device.gate.set()
    bench.settle()
    assert [load.source for load in bench.residency.finished_loads] == ["disk", "host"]
    assert bench.store.tier._streams["x"].users == 0
    bench.residency.before_layer(["x"])(0)
    assert len(bench.device.holds) <= 3, "what has arrived is not waited for"
    bench.residency.release("x")
    bench.check()
    assert bench.residency.evict("x")
    bench.residency.close()


@pytest.mark.parametrize("seed", range(6))
def test_each_layer_finds_its_basis_too_however_late_it_comes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Both arrive: nobody asks the adapter's own blocks to come after those of its basis."""
    bench = Bench(monkeypatch, seed)
    name = "of basis"
    for digest in ("basis", name):
        assert bench.residency.load(digest)
        bench.settle()
        bench.residency.prioritize([])
    assert bench.residency.evict("basis") and not bench.residency.resident()
    bench.arena.data.fill_(0xFF)
    bench.device.gate.clear()
    monkeypatch.setattr(bench.residency, "_most_loading", 16)
    assert bench.residency.load(name) and bench.residency.num_loading == 2, "at once"
    bench.residency.prioritize([])
    bench.check()
    assert bench.pool.num_available == 16 - bench.residency.num_leased_frames() == 8
    bench.residency.lease(name)
    frames = {digest: r.frames for digest, r in bench.residency._adapters.items()}
    seen: list[dict[str, bytes]] = []
    before_layer = bench.residency.before_layer([name])
    for layer in range(LAYERS):
        before_layer(layer)
        bench.device.computing._do(
            lambda: seen.append({d: landed(bench.arena.data, frames[d]) for d in frames})
        )
    bench.device.work_until(lambda: len(seen) == LAYERS)
    for end, there in zip(packed(name).layer_ends() * 4, seen, strict=True):
        for digest in ("basis", name):
            assert there[digest][:end] == content(digest)[:end], digest
    assert bench.files.num_reads == 2
    bench.device.gate.set()
    bench.settle()
    bench.residency.release(name)
    bench.check()
    assert bench.pool.num_available == 16
    bench.residency.close()


def test_rows_join_when_the_basis_keeps_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    name = "of basis"
    for digest in ("basis", name):
        assert bench.residency.load(digest)
        bench.settle()
        bench.residency.prioritize([])
    assert bench.residency.is_resident(name)
    assert bench.residency.evict("basis")
    bench.device.gate.clear()
    bench.residency.pace.took(0.0)
    bench.store.link.s_per_byte = 3600 / 1024
    assert bench.residency.load("basis")
    bench.store.link.s_per_byte = bench.store.link._free_at = 0.0
    monkeypatch.setattr(bench.residency, "_most_loading", 16)
    assert bench.residency.load(name) and bench.residency.num_loading == 2
    bench.residency.prioritize([name])
    assert bench.residency._adapters[name].arrival is not None
    assert not bench.residency.is_resident(name), "the basis takes an hour"
    bench.residency.pace._lead_s = 1e6
    assert bench.residency.is_resident(name)
    bench.device.gate.set()
    bench.settle()
    bench.residency.close()


def test_an_adapter_on_its_way_is_joined_only_when_it_keeps_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.near("x")
    bench.device.gate.clear()
    bench.residency.pace.took(0.0)
    bench.store.link.s_per_byte = 3600 / 1024
    assert bench.residency.load("x")
    assert not bench.residency.is_resident("x"), "an hour's transfer, no time to hide it in"
    assert not bench.residency.is_loading("x") and not bench.residency.evict("x")
    assert bench.pool.num_available == 16 - bench.residency.num_leased_frames() == 12
    assert bench.residency.load("x"), "it is on its way"
    bench.residency.prioritize([])
    assert bench.residency.num_loading == 1, "a transfer under way is not dropped"
    bench.residency.pace.took(1e9)
    bench.residency.pace._lead_s = 1e6
    assert bench.residency.is_resident("x")
    bench.residency.pace.took(0.0)
    bench.residency.pace._lead_s = 0.0
    bench.device.gate.set()
    bench.settle()
    assert bench.residency.is_resident("x")
    bench.check()
    bench.residency.close()


def test_an_arrival_waits_for_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    monkeypatch.setattr(bench.residency, "_most_loading", 16)
    bench.near("x")
    bench.files.gate.clear()
    for name in ("y", "z"):
        assert bench.residency.load(name)
    assert bench.residency.load("x")
    deadline = time.monotonic() + 10
    while bench.residency.num_loading > 2:
        assert time.monotonic() < deadline
        bench.residency.poll()
    assert bench.residency.is_resident("x") and not bench.residency.is_resident("y")
    bench.files.gate.set()
    bench.settle()
    bench.residency.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_every_stream_arrives_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", 2 * FRAME.slice_bytes)
    device = torch.device("cuda")
    arena = Arena(16, FRAME, device, poison=True)
    files: Any = Files()
    store = TieredStore(files, arena, CudaDevice(device), 4096)
    store.warm_up()
    for frames in ([3, 1, 9, 12], [0, 2, 4, 15]):
        adapter = packed(f"x{frames[0]}")
        store.read_into(adapter, frames, store.given())
        assert landed(arena.data.cpu(), frames) == content(adapter.digest)
        arena.data.fill_(0xFF)
        arrival = store.begin(adapter, frames, store.given())
        assert arrival is not None
        before_layer, seen = arrival.waits(), []
        for layer in range(LAYERS):
            before_layer(layer)
            seen.append(arena.data.clone())
        arrival.finish()
        for end, data in zip(adapter.layer_ends() * 4, seen, strict=True):
            assert landed(data.cpu(), frames)[:end] == content(adapter.digest)[:end]
    torch.cuda.synchronize()
    assert 0 <= store.waited_s() < 1 and store.waited_s() == 0


def landed(arena: torch.Tensor, frames: list[int]) -> bytes:
    size = FRAME.frame_bytes
    return b"".join(arena[f * size : (f + 1) * size].numpy().tobytes() for f in frames)
