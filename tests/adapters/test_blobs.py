"""Blobs are whole or absent, whatever the disk or the caller does."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.errors import InvalidRequest, NotFound, PayloadTooLarge, StorageFull

LIMIT = 1 << 20


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: BlobStore, data: bytes) -> str:
    with store.writer(LIMIT) as writer:
        writer.write(data)
        return writer.commit()


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_chunks_become_the_blob_of_their_whole(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    store, whole = BlobStore(folder), b"".join(chunks)
    with store.writer(len(whole)) as writer:
        for chunk in chunks:
            writer.write(chunk)
        assert writer.commit(sha(whole)) == sha(whole)
    assert store.has(sha(whole)) and store.verify(sha(whole))
    with store.open(sha(whole)) as file:
        assert file.read() == whole
    path = folder / "blobs" / "sha256" / sha(whole)[:2] / sha(whole)
    assert store.path(sha(whole)) == path
    assert files(folder) == [sha(whole)] and list(store.digests()) == [sha(whole)]
    assert store.delete(sha(whole)) and not store.delete(sha(whole))
    assert not store.has(sha(whole)) and files(folder) == []


def test_one_byte_too_many_is_refused_at_that_byte(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer(10) as writer:
        writer.write(b"0123456789")
        with pytest.raises(PayloadTooLarge, match="10 bytes"):
            writer.write(b"x")
        assert files(tmp_path) == []
    with store.writer(0) as writer:
        assert writer.commit() == sha(b"")


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writer(LIMIT) as writer:
        writer.write(b"half")
        raise KeyboardInterrupt
    writer = store.writer(LIMIT)
    writer.write(b"half")
    writer.abort()
    writer.abort()
    assert files(tmp_path) == []


def test_other_bytes_than_announced(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for expected, code in ((sha(b"b"), "digest_mismatch"), ("B" * 64, "digest_malformed")):
        with store.writer(LIMIT) as writer, pytest.raises(InvalidRequest) as caught:
            writer.write(b"a")
            writer.commit(expected)
        assert caught.value.code == code
        assert files(tmp_path) == []


@pytest.mark.parametrize(
    "digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "../" * 21 + "a", "a" * 64 + "\n"]
)
def test_a_malformed_digest_touches_no_file(tmp_path: Path, digest: str) -> None:
    store = BlobStore(tmp_path)
    for call in (store.has, store.path, store.open, store.verify, store.delete):
        with pytest.raises(InvalidRequest) as caught:
            call(digest)
        assert caught.value.code == "digest_malformed"
    with pytest.raises(InvalidRequest):
        adapter_digest("a" * 64, digest)


def test_a_missing_blob_is_not_found(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert not store.has("a" * 64) and not store.delete("a" * 64)
    with pytest.raises(NotFound):
        store.open("a" * 64)


def test_rot_is_seen_and_a_new_upload_heals_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = put(store, b"weights")
    store.path(digest).write_bytes(b"weightz")
    assert store.has(digest) and not store.verify(digest)
    assert put(store, b"weights") == digest
    assert store.verify(digest) and files(tmp_path) == [digest]


def test_the_same_blob_from_many_threads(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    data = os.urandom(50_000)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(put(store, data))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [sha(data)] * 8
    assert files(tmp_path) == [sha(data)] and store.verify(sha(data))


def test_sweep_takes_what_a_dead_process_left(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = put(store, b"whole")
    store.writer(LIMIT)._file.close()  # type: ignore[union-attr]  # as a killed process would
    assert len(files(tmp_path)) == 2
    assert BlobStore(tmp_path).sweep() == 1
    assert files(tmp_path) == [digest]


@pytest.mark.parametrize("number", [5, 28, 30, 122])  # EIO, ENOSPC, EROFS, EDQUOT
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store = BlobStore(tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.write = refuse

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with pytest.raises(StorageFull), store.writer(LIMIT) as writer:
        if call == "write":
            writer._file = Full(writer._file)
        else:
            monkeypatch.setattr(os, call, refuse)
        writer.write(b"data")
        writer.commit()
    assert files(tmp_path) == []
    monkeypatch.undo()
    assert store.verify(put(store, b"data"))


def test_bytes_are_durable_before_their_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)
    log: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        log.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def replace(src: Path, dst: Path) -> None:
        log.append(f"replace {src.name} {dst.name}")
        real_replace(src, dst)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    digest = put(store, b"x")
    temporary = log[0].removeprefix("fsync ")
    assert (
        log
        == [
            f"fsync {temporary}",
            "fsync sha256",  # the new two-digit directory
            f"replace {temporary} {digest}",
            f"fsync {digest[:2]}",
        ]
    )


def test_the_adapter_digest_is_what_it_says(tmp_path: Path) -> None:
    config, weights = sha(b"config"), sha(b"weights")
    length = (32).to_bytes(8, "little")
    whole = length + bytes.fromhex(config) + length + bytes.fromhex(weights)
    assert adapter_digest(config, weights) == sha(whole)
    assert adapter_digest(config, weights) != adapter_digest(weights, config)
