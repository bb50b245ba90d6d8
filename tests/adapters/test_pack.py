"""The packed file: sizes, chunks, damage."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.peft_files import (
    base_description,
    import_files,
    make_config,
    make_tensors,
    safetensors_bytes,
)

from loramux.adapters import pack
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, ConfigError, LoramuxError, StorageFull

DIGEST = "0123456789abcdef" * 4


def pack_random(folder: Path, path: Path) -> None:
    """Pack a random adapter of q and v in every layer; the same one every time."""
    base = base_description()
    (folder / "weights").write_bytes(safetensors_bytes(make_tensors(base)))
    with open(folder / "weights", "rb") as file:
        pack.pack(import_files(make_config(), read_tensors(file), base), base, DIGEST, path)


@pytest.fixture
def packed(tmp_path: Path) -> pack.PackedAdapter:
    path = pack.packed_path(tmp_path, DIGEST, base_description().fingerprint)
    pack_random(tmp_path, path)
    return pack.read_header(path)


def test_the_header_says_what_was_packed(packed: pack.PackedAdapter, tmp_path: Path) -> None:
    assert packed.digest == DIGEST and packed.fingerprint == "f" * 64
    assert packed.path == tmp_path / "packed" / f"{DIGEST}-{'f' * 16}-v{pack.IMPORTER_VERSION}.lmx"
    assert packed.payload_offset % 4096 == 0
    assert packed.num_bytes == packed.num_elems * 4 == 3 * 4 * (32 + 32 + 32 + 16) * 4
    assert packed.max_rank == 4 and packed.num_layers == 3 and packed.chunk == 16
    assert [p.name for p in packed.path.parent.iterdir()] == [packed.path.name]


def test_packing_again_gives_the_same_file(packed: pack.PackedAdapter, tmp_path: Path) -> None:
    before = packed.path.read_bytes()
    pack_random(tmp_path, packed.path)
    assert packed.path.read_bytes() == before


@given(st.data())
def test_damage_before_the_payload_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damage"
    original = folder / "whole"
    if not original.exists():
        folder.mkdir()
        pack_random(folder, original)
    good = original.read_bytes()
    used = len(good[: pack.read_header(original).payload_offset].rstrip(b"\0"))
    forged = bytearray(good)
    if data.draw(st.booleans()):
        forged = forged[: data.draw(st.integers(0, len(good) - 1))]
    else:
        forged[data.draw(st.integers(0, used - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / "forged"
    path.write_bytes(forged)
    with pytest.raises(AdapterInvalid) as caught:
        pack.read_header(path)
    assert caught.value.code == "packed_file_invalid"


def test_a_flipped_payload_bit_is_noticed(packed: pack.PackedAdapter) -> None:
    assert pack.verify_payload(packed)
    with open(packed.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert not pack.verify_payload(pack.read_header(packed.path))


def test_another_format_version_is_named(packed: pack.PackedAdapter) -> None:
    data = bytearray(packed.path.read_bytes())
    data[8] = 9
    packed.path.write_bytes(data)
    with pytest.raises(AdapterInvalid, match="format version 9"):
        pack.read_header(packed.path)
    with pytest.raises(FileNotFoundError):
        pack.read_header(packed.path.with_name("nothing"))


@pytest.mark.parametrize(
    ("widths", "slice_bytes", "itemsize", "chunk"),
    [
        ([4096, 14336], 65536, 2, 128),
        ([576, 1536], 12288, 2, 64),
        ([576, 1536], 12288, 4, 64),
        ([192, 512, 64], 4096, 4, 64),
        ([96], 1 << 16, 4, 32),
        ([48], 1 << 16, 4, 16),
        ([40], 1 << 16, 4, 16),  # padded
        ([128], 16 * 4, 4, 16),
        ([128], 48 * 4, 4, 16),
        ([128], 96 * 4, 2, 64),
    ],
)
def test_the_chunk_divides_everything(
    widths: list[int], slice_bytes: int, itemsize: int, chunk: int
) -> None:
    pairs = {str(i): (width, widths[0]) for i, width in enumerate(widths)}
    assert pack.chunk_elems(pairs, slice_bytes, itemsize) == chunk


@pytest.mark.parametrize(
    ("slice_bytes", "itemsize"), [(8 * 4, 4), (24 * 4, 4), (24 * 2, 2), (66, 4)]
)
def test_a_slice_that_is_not_whole_chunks_is_refused(slice_bytes: int, itemsize: int) -> None:
    with pytest.raises(ConfigError, match="page_tokens"):
        pack.chunk_elems({"q_proj": (64, 64)}, slice_bytes, itemsize)


@given(
    hidden=st.integers(1, 70),
    inter=st.integers(1, 70),
    page_tokens=st.sampled_from([1, 3, 16, 64]),
    other=st.sampled_from([2, 5, 32]),
)
def test_the_stream_does_not_depend_on_the_slice(
    tmp_path_factory: pytest.TempPathFactory, hidden: int, inter: int, page_tokens: int, other: int
) -> None:
    """So a packed file outlives a change of page_tokens."""
    one = base_description(hidden=hidden, inter=inter, page_tokens=page_tokens)
    two = base_description(hidden=hidden, inter=inter, page_tokens=other)
    tensors = make_tensors(one, rank=3, modules=("q_proj", "up_proj", "down_proj"))
    path = tmp_path_factory.getbasetemp() / "weights"
    path.write_bytes(safetensors_bytes(tensors))
    with open(path, "rb") as file:
        config = make_config(r=3, target_modules=["q_proj", "up_proj", "down_proj"])
        adapter = import_files(config, read_tensors(file), one)
        a, b = pack.lay_out(adapter, one), pack.lay_out(adapter, two)
    assert a.num_elems == b.num_elems
    assert (a.a_offset == b.a_offset).all() and (a.b_offset == b.b_offset).all()
    for layout, base in ((a, one), (b, two)):
        slice_elems = base.slice_bytes // 4
        assert slice_elems % layout.chunk == 0
        for offset in (*layout.a_offset.flat, *layout.b_offset.flat):
            assert offset % layout.chunk == 0, "vectors begin at whole chunks"
        slices = layout.num_slices(base.slice_bytes)
        assert (slices - 1) * slice_elems < layout.num_elems <= slices * slice_elems
        frames = layout.num_frames(base.slice_bytes)
        assert (frames - 1) * base.num_layers < slices <= frames * base.num_layers


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_paths_are_made_of_digests_only(tmp_path: Path, digest: str) -> None:
    with pytest.raises(LoramuxError):
        pack.packed_path(tmp_path, digest, "f" * 64)


@pytest.mark.parametrize("fingerprint", ["", "../x", "a/b", "a\n"])
def test_paths_are_made_of_plain_fingerprints_only(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(ConfigError):
        pack.packed_path(tmp_path, DIGEST, fingerprint)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = pack.packed_path(tmp_path, DIGEST, base_description().fingerprint)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(pack, "_stream", full)
        else:
            patched.setattr(os, call, full)
        with pytest.raises(StorageFull):
            pack_random(tmp_path, path)
    assert list(path.parent.iterdir()) == []
    pack_random(tmp_path, path)
    assert pack.verify_payload(pack.read_header(path))


def test_bytes_are_durable_before_their_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack.packed_path(tmp_path, DIGEST, "f" * 64)
    pack_random(tmp_path, path)
    log: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        log.append("fsync " + Path(os.readlink(f"/proc/self/fd/{fd}")).suffix)
        real_fsync(fd)

    def replace(src: Path, dst: Path) -> None:
        log.append(f"replace {src.suffix} {dst.suffix}")
        real_replace(src, dst)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    pack_random(tmp_path, path)
    assert log == ["fsync .tmp", "replace .tmp .lmx", "fsync "]


def test_sweep_removes_only_what_was_interrupted(
    packed: pack.PackedAdapter, tmp_path: Path
) -> None:
    (tmp_path / "packed" / f"{'0' * 32}.tmp").write_bytes(b"half")
    assert pack.sweep(tmp_path) == 1
    assert [p.name for p in packed.path.parent.iterdir()] == [packed.path.name]
    assert re.fullmatch(r"[0-9a-f]{64}-[0-9A-Za-z_-]{1,16}-v\d+\.lmx", packed.path.name)
    assert pack.sweep(tmp_path / "nowhere") == 0


def test_scales_survive_as_float32(packed: pack.PackedAdapter) -> None:
    assert packed.scale.dtype == np.float32
    assert packed.scale.tolist() == [[2.0, 0, 2.0, *[0] * 9]] * 3
    assert packed.rank.tolist() == [[4, 0, 4, *[0] * 9]] * 3
