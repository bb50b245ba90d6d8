"""The way from a packed file into frames: few calls, no stop on the way, damage is noticed."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters import packed_files
from loramux.adapters.pack import PackedAdapter, PayloadSum
from loramux.adapters.packed_files import FrameStore, PackedFiles
from loramux.errors import AdapterLoadFailed
from loramux.memory.arena import Arena
from loramux.memory.formats import FrameShape
from loramux.wire import TABLE_MODULES

DIGEST = "a" * 64
FRAME = FrameShape(num_slices=3, slice_bytes=1088)  # no multiple of a sector


class Bench:
    """A packed file of ``num_bytes`` random bytes, its header in a cache of its own, an arena."""

    def __init__(self, folder: Path, num_bytes: int, num_frames: int) -> None:
        self.data = np.random.default_rng(num_bytes).bytes(num_bytes)
        self.path = folder / "adapter.lmx"
        self.path.write_bytes(b"header, padded" * 10 + self.data)
        payload_sum = PayloadSum()
        payload_sum.update(memoryview(self.data))
        empty = np.zeros((1, len(TABLE_MODULES)), np.int64)
        self.packed = PackedAdapter(
            dtype="float32",
            chunk=16,
            num_elems=num_bytes // 4,
            a_offset=empty,
            b_offset=empty,
            middle_offset=empty - 1,
            rank=empty.astype(np.int32),
            scale=empty.astype(np.float32),
            vector_offset=np.full((1, len(TABLE_MODULES), 3), -1, np.int64),
            token_ids_offset=np.zeros(2, np.int64),
            token_rows_offset=np.zeros(2, np.int64),
            num_token_rows=np.zeros(2, np.int32),
            path=self.path,
            digest=DIGEST,
            fingerprint="f",
            importer_version=1,
            basis=None,
            payload_sum=payload_sum.hexdigest(),
            payload_offset=140,
        )
        self.arena = Arena(num_frames, FRAME, torch.device("cpu"), poison=True)
        self.files = PackedFiles(folder, "f")
        self.store = FrameStore(self.files, self.arena)
        self.headers_read: list[Path] = []

    def stream(self, frames: list[int]) -> bytes:
        whole = b"".join(self.arena.frame_data(frame).numpy().tobytes() for frame in frames)
        return whole[: len(self.data)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    def make(num_bytes: int = 40_000, num_frames: int = 20) -> Bench:
        bench = Bench(tmp_path, num_bytes, num_frames)

        def read_header(path: Path) -> PackedAdapter:
            bench.headers_read.append(path)
            return replace(bench.packed, digest=path.name.partition("-")[0])

        monkeypatch.setattr(packed_files, "read_header", read_header)
        return bench

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(number of pieces, bytes read) of every preadv."""
    seen: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        got = real(file, views, offset)
        seen.append((len(views), got))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def test_one_call_brings_a_whole_adapter_into_its_frames(
    bench: Callable[..., Bench], calls: list[tuple[int, int]]
) -> None:
    b = bench(num_bytes=12 * FRAME.frame_bytes + 500)
    b.files.header(DIGEST)
    b.store.read_into(b.packed, [14, 15, 16, 17, 8, 10, 12, 0, 1, 2, 3, 4, 5], None)
    assert calls == [(1, FRAME.frame_bytes)] * 12 + [(1, 500)], "summed frame by frame, once"
    b.arena.data.fill_(0xFF)
    calls.clear()
    frames = [19, 3, 4, 5, 0, 7, 11, 2, 18, 1, 9, 13, 6]
    b.store.read_into(b.packed, frames, None)
    assert calls == [(13, len(b.data))]
    assert b.stream(frames) == b.data
    untouched = sorted(set(range(20)) - set(frames))
    assert all((b.arena.frame_data(frame) == 0xFF).all() for frame in untouched)
    assert (b.arena.frame_data(6)[500:] == 0xFF).all(), "nothing is written past the stream"


def test_more_frames_than_the_system_takes_at_once(
    bench: Callable[..., Bench], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "IOV_MAX", 5)
    b = bench(num_bytes=11 * FRAME.frame_bytes)
    b.files.header(DIGEST)
    b.store.read_into(b.packed, list(range(11)), None)
    b.arena.data.fill_(0xFF)
    calls.clear()
    b.store.read_into(b.packed, list(range(11)), None)
    assert [pieces for pieces, _ in calls] == [5, 5, 1]
    assert b.stream(list(range(11))) == b.data


@pytest.mark.parametrize("most", [1, 1000, FRAME.frame_bytes, 2 * FRAME.frame_bytes + 1])
def test_short_reads_go_on_where_they_stopped(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    b = bench(num_bytes=3 * FRAME.frame_bytes - 64)
    real = os.preadv

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        few: list[memoryview] = []
        for view in views:
            few.append(view[: most - sum(map(len, few))])
        return real(file, few, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    b.files.header(DIGEST)
    for frames in ([4, 0, 2], [7, 9, 8]):
        b.store.read_into(b.packed, frames, None)
        assert b.stream(frames) == b.data


def test_the_bytes_make_no_stop_in_python(bench: Callable[..., Bench]) -> None:
    b = bench(num_bytes=1_000 * FRAME.frame_bytes, num_frames=1_000)
    b.files.header(DIGEST)
    b.store.read_into(b.packed, list(range(1_000)), None)
    tracemalloc.start()
    b.store.read_into(b.packed, list(reversed(range(1_000))), None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(b.data) / 4, "a copy of the payload was made on the way"


def test_the_payload_is_summed_once_for_each_file(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    sums: list[Any] = []

    def counted() -> PayloadSum:
        sums.append(PayloadSum())
        return sums[-1]

    monkeypatch.setattr(packed_files, "PayloadSum", counted)
    frames = list(range(15))
    b.files.header(DIGEST)
    for _ in range(3):
        b.store.read_into(b.packed, frames, None)
    assert len(sums) == 1
    other = b.path.with_name("other")
    other.write_bytes(b.path.read_bytes()[:-1] + b"?")
    other.replace(b.path)
    with pytest.raises(AdapterLoadFailed, match="checksum"):
        b.store.read_into(b.packed, frames, None)
    assert len(sums) == 2, "another file at the same place is not trusted"


def test_a_file_that_is_cut_short(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.path.write_bytes(b.path.read_bytes()[:-1])
    with pytest.raises(AdapterLoadFailed, match="shorter"):
        b.store.read_into(b.packed, list(range(15)), None)


def test_headers_are_remembered_within_bounds_and_read_anew_after_a_failure(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    monkeypatch.setattr(packed_files, "MOST_HEADERS", 2)
    names = [letter * 64 for letter in "bcd"]
    for name in (names[0], names[1], names[0], names[2], names[0]):
        b.files.header(name)
    assert len(b.headers_read) == 3
    b.files.header(names[1])
    assert len(b.headers_read) == 4, "the one not asked for longest was forgotten"
    b.files.header(DIGEST)
    b.path.unlink()
    with pytest.raises(FileNotFoundError):
        b.store.read_into(b.packed, list(range(15)), None)
    before = len(b.headers_read)
    b.files.header(DIGEST)
    assert len(b.headers_read) == before + 1


def summed(*pieces: bytes) -> str:
    payload_sum = PayloadSum()
    for piece in pieces:
        payload_sum.update(memoryview(piece))
    return payload_sum.hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.lists(st.integers(0, 20_000), max_size=6), st.data())
def test_a_sum_does_not_depend_on_the_pieces_and_finds_damage(
    size: int, cuts: list[int], data: st.DataObject
) -> None:
    payload = np.random.default_rng(size).bytes(size)
    ends = sorted(min(cut, size) for cut in cuts)
    pieces = [payload[a:b] for a, b in zip([0, *ends], [*ends, size], strict=True)]
    assert summed(*pieces) == summed(payload)
    if size:
        at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
        flipped = bytearray(payload)
        flipped[at] ^= 1 << bit
        assert summed(bytes(flipped)) != summed(payload)


def test_sectors_in_the_wrong_place_change_the_sum() -> None:
    a, b = np.random.default_rng(0).bytes(4096), np.random.default_rng(1).bytes(4096)
    assert len({summed(a, b), summed(b, a), summed(a, a), summed(a, bytes(4096))}) == 4


def test_a_file_under_another_adapters_name_is_never_served(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    monkeypatch.setattr(packed_files, "read_header", lambda path: b.packed)
    b.files.header(DIGEST)
    with pytest.raises(AdapterLoadFailed, match="another adapter"):
        b.files.header("b" * 64)
