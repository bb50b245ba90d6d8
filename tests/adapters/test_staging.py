"""Disk -> pinned memory -> ring -> slices, on a device that does things as late and in as bad an
order as it may."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.fake_device import FakeDevice

from loramux.adapters import staging
from loramux.adapters.host_tier import HostTier
from loramux.adapters.staging import TieredStore
from loramux.errors import AdapterLoadFailed
from loramux.memory.arena import Arena
from loramux.memory.formats import FrameShape

FRAME = FrameShape(num_slices=3, slice_bytes=64)
BLOCK = 2 * FRAME.slice_bytes


def packed(name: str, num_bytes: int) -> Any:
    return SimpleNamespace(
        digest=name,
        num_bytes=num_bytes,
        num_slices=lambda slice_bytes: -(-num_bytes // slice_bytes),
    )


class Files:
    """Streams made of their name; counts what is read."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.broken = False

    def header(self, digest: str) -> Any:
        raise NotImplementedError

    @staticmethod
    def data(adapter: Any) -> bytes:
        seed = sum(adapter.digest.encode()) + adapter.num_bytes
        return np.random.default_rng(seed).bytes(adapter.num_bytes)

    def read(self, adapter: Any, views: Sequence[memoryview]) -> None:
        self.reads.append(adapter.digest)
        data = self.data(adapter)
        assert sum(map(len, views)) == len(data)
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]
        if self.broken:
            raise OSError("the disk says no")


class Bench:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, host_blocks: int = 8, seed: int = 0
    ) -> None:
        monkeypatch.setattr(staging, "BLOCK_BYTES", BLOCK + 8)
        self.device = FakeDevice(seed)
        self.files = Files()
        self.arena = Arena(30, FRAME, torch.device("cpu"), poison=True)
        files: Any = self.files
        self.store = TieredStore(files, self.arena, self.device, host_blocks * BLOCK + 5)

    def load(self, adapter: Any, frames: list[int]) -> None:
        self.store.read_into(adapter, frames, None)
        whole = b"".join(self.arena.frame_data(frame).numpy().tobytes() for frame in frames)
        assert whole[: adapter.num_bytes] == Files.data(adapter)
        assert set(whole[adapter.num_bytes :]) <= {0xFF}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_order_of_the_device_every_stream_arrives(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(monkeypatch, seed=data.draw(st.integers(0, 99), label="seed"))
        free = data.draw(st.permutations(range(30)), label="frames")
        for _ in range(data.draw(st.integers(1, 6), label="loads")):
            adapter = packed(
                data.draw(st.sampled_from("abc"), label="name"),
                8 * data.draw(st.integers(1, 8 * BLOCK // 8), label="words"),
            )
            adapter.digest += str(adapter.num_bytes)
            num_frames = -(-adapter.num_bytes // FRAME.frame_bytes)
            bench.load(adapter, free[:num_frames])
            bench.arena.freed(free[:num_frames])
            free = free[num_frames:] + free[:num_frames]


def test_warming_up_writes_the_first_slice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.store.warm_up()
    assert (bench.arena.data[: FRAME.slice_bytes] == 0).all()
    assert (bench.arena.data[FRAME.slice_bytes :] == 0xFF).all()


def test_one_transfer_and_one_launch_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.load(packed("x", 5 * BLOCK + 24), [7, 3, 11, 0])
    assert bench.device.transfers == [BLOCK] * 5 + [24]
    assert bench.device.num_scatters == 6


def test_what_is_in_the_host_tier_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, host_blocks=4)
    for name in ("a", "b", "a", "c", "a", "b"):
        bench.load(packed(name, 2 * BLOCK - 8), [0, 1])
    assert bench.files.reads == ["a", "b", "c", "b"], "the one used longest ago gave way"
    assert set(bench.store.tier._streams) == {"a", "b"}
    assert set(bench.store.in_host()) == {"a", "b"} and all(bench.store.in_host().values())


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_not_written_before_their_last_reader_is_done(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    bench = Bench(monkeypatch, seed=seed)
    read: list[bytes] = []
    before = bench.arena.data.numpy().tobytes()
    bench.device.computing._do(lambda: read.append(bench.arena.data.numpy().tobytes()))
    bench.store.read_into(packed("x", 8 * BLOCK), list(range(6)), bench.store.given())
    assert read == [before]


def test_a_failed_read_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, host_blocks=2)
    bench.files.broken = True
    with pytest.raises(OSError, match="the disk says no"):
        bench.load(packed("x", 2 * BLOCK), [0, 1])
    assert not bench.store.tier._streams
    bench.files.broken = False
    bench.load(packed("x", 2 * BLOCK), [0, 1])


def test_an_adapter_larger_than_the_tier_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, host_blocks=2)
    with pytest.raises(AdapterLoadFailed, match="--host-memory"):
        bench.load(packed("x", 2 * BLOCK + 8), [0, 1])


def test_a_stream_in_use_is_not_given_up_and_whoever_needs_its_place_waits() -> None:
    tier = HostTier(torch.empty(4 * 16, dtype=torch.uint8), 16)
    files = Files()
    arrived = threading.Event()

    def other() -> None:
        with tier.stream(packed("b", 32), files.read):
            arrived.set()

    thread = threading.Thread(target=other)
    with tier.stream(packed("a", 40), files.read) as blocks:
        assert [len(block) for block in blocks] == [16, 16, 8]
        thread.start()
        assert not arrived.wait(0.05)
        assert b"".join(b.numpy().tobytes() for b in blocks) == Files.data(packed("a", 40))
    thread.join(5)
    assert arrived.is_set() and set(tier._streams) == {"b"}


def test_a_send_that_finds_no_memory_is_left_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps the pinned blocks then, and another fault is told."""
    bench = Bench(monkeypatch, host_blocks=2)
    adapter = packed("a", BLOCK)
    bench.load(adapter, [1])

    def fail(error: Exception) -> None:
        def send(*_: Any) -> None:
            raise error

        monkeypatch.setattr(bench.store._ring, "send", send)

    fail(torch.OutOfMemoryError("as planned"))
    assert bench.store.begin(adapter, [2], None) is None
    fail(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError):
        bench.store.begin(adapter, [2], None)
    assert [stream.users for stream in bench.store.tier._streams.values()] == [0]
