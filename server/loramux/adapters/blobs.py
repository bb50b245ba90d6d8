"""Uploaded files, stored once under the SHA-256 of their bytes.

    <data_dir>/blobs/sha256/<first two hex>/<hex>    complete, immutable files
    <data_dir>/blobs/tmp/                            files being written

A file gets its final name only after its bytes are on the disk, so a name that exists is whole
whatever happened in between. Digests are 64 lower-case hex digits, checked before any path is made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from loramux.errors import InvalidRequest, LoramuxError, NotFound, PayloadTooLarge, StorageFull

READ_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def check_digest(digest: str) -> str:
    """The digest itself; InvalidRequest (digest_malformed) unless it is 64 lower-case hex."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(
            "a digest is 64 lower-case hexadecimal digits", param="digest", code="digest_malformed"
        )
    return digest


def adapter_digest(
    config_digest: str, weights_digest: str, profile_digest: str = "", heads_digest: str = ""
) -> str:
    """The identity of an adapter version.

    SHA-256 over its files' raw digests (config, weights, profile, heads), each after its length as
    8 bytes, little-endian. One that it has not ("") is empty, and left out when none follows.
    """
    whole = hashlib.sha256()
    files = [check_digest(config_digest), check_digest(weights_digest)]
    files += [profile_digest, heads_digest]
    while not files[-1]:
        files.pop()
    for digest in files:
        raw = bytes.fromhex(check_digest(digest)) if digest else b""
        whole.update(len(raw).to_bytes(8, "little") + raw)
    return whole.hexdigest()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn "the disk is full, read-only or broken" into StorageFull, and leave the rest alone."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        reason = os.strerror(error.errno or 0).lower()
        raise StorageFull(f"the data directory cannot take the file: {reason}") from error


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_durable_dir(path: Path) -> None:
    """``mkdir -p`` whose new names survive a power cut."""
    if path.is_dir():
        return
    make_durable_dir(path.parent)
    path.mkdir(exist_ok=True)
    fsync_dir(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete, fsynced file its final name, atomically and durably."""
    os.replace(temporary, final)
    fsync_dir(final.parent)


class BlobWriter:
    """Receives one blob. A context manager: leaving it without a commit leaves nothing behind.

    Methods raise PayloadTooLarge at the first byte over ``limit_bytes`` and StorageFull when the
    disk refuses; after either the partial file is already gone.
    """

    def __init__(self, store: BlobStore, limit_bytes: int) -> None:
        self._store = store
        self._limit_bytes = limit_bytes
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self._path = store.temporary_dir / secrets.token_hex(16)
        with disk_errors():
            self._file: BinaryIO | None = open(self._path, "xb")  # closed by commit or abort

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        assert self._file is not None, "the writer is finished"
        if self.num_bytes + len(data) > self._limit_bytes:
            self.abort()
            raise PayloadTooLarge(f"the file is larger than {self._limit_bytes} bytes")
        try:
            with disk_errors():
                self._file.write(data)
        except LoramuxError:
            self.abort()
            raise
        self._hash.update(data)
        self.num_bytes += len(data)

    @property
    def digest(self) -> str:
        """Of the bytes written so far."""
        return self._hash.hexdigest()

    def commit(self, expected: str | None = None) -> str:
        """Make the blob durable under its digest, which is returned.

        Raises InvalidRequest (digest_mismatch) when ``expected`` is another digest.
        """
        assert self._file is not None, "the writer is finished"
        digest = self.digest
        try:
            if expected is not None and check_digest(expected) != digest:
                raise InvalidRequest(
                    "the bytes received do not have the announced digest",
                    param="digest",
                    code="digest_mismatch",
                )
            final = self._store.path(digest)
            with disk_errors():
                self._file.flush()
                os.fsync(self._file.fileno())
                make_durable_dir(final.parent)
                # Also when the blob exists: equal bytes, and a copy that rotted is made good.
                publish(self._path, final)
        except BaseException:
            self.abort()
            raise
        self._file.close()
        self._file = None
        return digest

    def abort(self) -> None:
        """Drop what was written. Harmless when repeated and after commit."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()  # flushes, which a full disk refuses
        except OSError:
            pass
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class BlobStore:
    """The blobs of one data directory. Safe to use from several threads and processes."""

    def __init__(self, data_dir: Path) -> None:
        self._blobs = data_dir / "blobs" / "sha256"
        self.temporary_dir = data_dir / "blobs" / "tmp"
        with disk_errors():
            make_durable_dir(self._blobs)
            make_durable_dir(self.temporary_dir)

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        check_digest(digest)
        return self._blobs / digest[:2] / digest

    def writer(self, limit_bytes: int) -> BlobWriter:
        """Start receiving a blob of at most ``limit_bytes``."""
        return BlobWriter(self, limit_bytes)

    def has(self, digest: str) -> bool:
        """Whether the blob is stored."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of a stored blob; 0 when there is none."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def open(self, digest: str) -> BinaryIO:
        """The blob for reading; NotFound (blob_not_found) when there is none."""
        try:
            return open(self.path(digest), "rb")
        except FileNotFoundError:
            raise NotFound("no such blob", param="digest", code="blob_not_found") from None

    def verify(self, digest: str) -> bool:
        """Whether the stored bytes still have their digest. Reads the whole blob."""
        actual = hashlib.sha256()
        with self.open(digest) as file:
            while block := file.read(READ_BYTES):
                actual.update(block)
        return actual.hexdigest() == digest

    def delete(self, digest: str) -> bool:
        """Remove a blob; whether there was one. A power cut may bring it back."""
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def digests(self) -> Iterator[str]:
        """Every stored blob, in no order."""
        for path in self._blobs.glob("[0-9a-f][0-9a-f]/*"):
            if _DIGEST.fullmatch(path.name):
                yield path.name

    def sweep(self) -> int:
        """Remove what interrupted writers left; how many files. Call before any writer starts."""
        leftovers = list(self.temporary_dir.iterdir())
        for path in leftovers:
            path.unlink(missing_ok=True)
        return len(leftovers)
