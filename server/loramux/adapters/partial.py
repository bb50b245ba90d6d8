"""Uploads that arrive in parts, over connections that break and servers that restart.

    <data_dir>/uploads/<id>    what has arrived, and a row in the registry's file beside it

The file's size is the offset. A row exists only after its file and a file goes only after its row,
so that a start finds at most files without a row. Nothing here believes the bytes of a file: they
are hashed as a whole in the end, and only a file that passes becomes a blob.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from loramux.adapters.blobs import (
    READ_BYTES,
    BlobStore,
    check_digest,
    disk_errors,
    fsync_dir,
    make_durable_dir,
    publish,
)
from loramux.adapters.database import Database
from loramux.adapters.tenant_blobs import grant
from loramux.errors import InvalidRequest, NotFound, RateLimited, StorageFull

MAX_OPEN = 64
"""Uploads one tenant may have open: each is a file and a row for as long as it lives."""

_ID = re.compile(r"[0-9a-f]{32}")


class PartialUpload(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that is not complete: declared size and digest; times in Unix seconds."""

    id: str
    tenant: str
    num_bytes: int
    sha256: str
    created: float
    expires: float


class PartialFile:
    """The file of one upload, open for appending from ``start``, its size when it was opened."""

    def __init__(self, path: Path) -> None:
        with disk_errors():
            self._file: BinaryIO = open(path, "ab", buffering=0)
            self.start = self._file.seek(0, os.SEEK_END)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of it. Raises StorageFull; some may have been written then."""
        with disk_errors():
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def keep(self) -> int:
        """Make what was written durable and close; the new size.

        Raises StorageFull, and then nothing was kept.
        """
        try:
            with disk_errors():
                os.fsync(self._file.fileno())
        except StorageFull:
            self.undo()
            raise
        size = self._file.seek(0, os.SEEK_END)
        self._file.close()
        return size

    def undo(self) -> None:
        """Take back what was written and close. A disk that refuses this too does no harm: wrong
        bytes do not pass the hash."""
        with self._file, suppress(OSError):
            self._file.truncate(self.start)
            os.fsync(self._file.fileno())


class PartialUploads:
    """The open uploads of one data directory. At most one call at a time for the same upload.

    An upload that is unknown, expired, done or another tenant's is NotFound (upload_not_found).
    """

    def __init__(self, database: Database, data_dir: Path) -> None:
        self._database = database
        self._folder = data_dir / "uploads"
        with disk_errors():
            make_durable_dir(self._folder)

    def create(self, tenant: str, num_bytes: int, sha256: str, ttl_s: float) -> PartialUpload:
        """Open one. Raises InvalidRequest (digest_malformed), RateLimited, StorageFull."""
        now = time.time()
        upload = PartialUpload(
            id=secrets.token_hex(16),
            tenant=tenant,
            num_bytes=num_bytes,
            sha256=check_digest(sha256),
            created=now,
            expires=now + ttl_s,
        )
        path = self._folder / upload.id
        try:
            with disk_errors():
                path.touch(exist_ok=False)
                fsync_dir(self._folder)
            with self._database.transaction() as db:
                count = "SELECT count(*) FROM uploads WHERE tenant = ? AND expires > ?"
                if db.execute(count, (tenant, now)).fetchone()[0] >= MAX_OPEN:
                    raise RateLimited(
                        f"{MAX_OPEN} uploads are open: complete or cancel one", retry_after_s=60
                    )
                db.execute(
                    "INSERT INTO uploads VALUES (:id, :tenant, :num_bytes, :sha256, :created,"
                    " :expires)",
                    msgspec.structs.asdict(upload),
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return upload

    def get(self, tenant: str, upload_id: str) -> PartialUpload:
        """An open upload of this tenant."""
        query = "SELECT * FROM uploads WHERE id = ? AND tenant = ? AND expires > ?"
        if _ID.fullmatch(upload_id):
            with self._database.reading() as db:
                found = db.execute(query, (upload_id, tenant, time.time())).fetchone()
            if found is not None:
                return _read(found)
        raise NotFound("no such upload", param="id", code="upload_not_found")

    def offset(self, upload: PartialUpload) -> int:
        """How many bytes have arrived."""
        return (self._folder / upload.id).stat().st_size

    def open(self, upload: PartialUpload) -> PartialFile:
        """Its file, for appending."""
        return PartialFile(self._folder / upload.id)

    def publish(self, upload: PartialUpload, store: BlobStore) -> None:
        """Hash the file and make it the blob that was declared; ``settle`` has to follow.

        Raises InvalidRequest (digest_mismatch) after which the upload is to be removed.
        """
        path, whole = self._folder / upload.id, hashlib.sha256()
        with disk_errors():
            with open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    whole.update(block)
                # A server that died may have left bytes that no disk has seen yet.
                os.fsync(file.fileno())
            if whole.hexdigest() != upload.sha256:
                raise InvalidRequest(
                    "the bytes received do not have the announced digest: start again",
                    param="sha256",
                    code="digest_mismatch",
                )
            final = store.path(upload.sha256)
            make_durable_dir(final.parent)
            publish(path, final)

    def settle(self, upload: PartialUpload, ttl_s: float) -> None:
        """The blob is the tenant's and the upload is over, in one transaction."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))
            grant(db, upload.tenant, upload.sha256, upload.num_bytes, ttl_s)

    def remove(self, upload_id: str) -> None:
        """End an upload and drop what has arrived."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload_id,))
        (self._folder / upload_id).unlink(missing_ok=True)

    def expired(self) -> list[str]:
        """The ids of uploads whose time is over."""
        with self._database.reading() as db:
            rows = db.execute("SELECT id FROM uploads WHERE expires <= ?", (time.time(),))
            return [upload_id for (upload_id,) in rows.fetchall()]

    def repair(self) -> None:
        """At start: files and rows that a death has left without each other go."""
        with self._database.reading() as db:
            rows = {upload_id for (upload_id,) in db.execute("SELECT id FROM uploads").fetchall()}
        files = {path.name for path in self._folder.iterdir()}
        for name in files - rows:
            (self._folder / name).unlink()
        for upload_id in rows - files:  # died between ``publish`` and ``settle``
            self.remove(upload_id)


def _read(record: sqlite3.Row) -> PartialUpload:
    return PartialUpload(**dict(record))
