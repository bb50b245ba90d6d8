"""Uploads in parts: open, append, ask where one stands, complete or cancel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from loramux.adapters.blobs import BlobStore
from loramux.adapters.database import Database
from loramux.adapters.partial import PartialUpload, PartialUploads
from loramux.config import ServerConfig
from loramux.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    StorageFull,
    UploadOffsetConflict,
)
from loramux.front.background import Background
from loramux.front.blobs import BlobService
from loramux.front.uploads import AppendWriter


class ResumableUploads:
    """``/v1/uploads``. State is on disk alone, but for who appends at the moment.

    Everything that takes an id raises NotFound (upload_not_found), also for another tenant's.
    """

    def __init__(
        self,
        config: ServerConfig,
        database: Database,
        store: BlobStore,
        blobs: BlobService,
        background: Background,
    ) -> None:
        self._config = config
        self._store = store
        self._blobs = blobs
        self._background = background
        self._busy: dict[str, int | None] = {}  # where what is being appended to stood before
        self._partial = PartialUploads(database, config.data_dir)
        self._partial.repair()

    async def create(self, tenant: str, num_bytes: int, sha256: str) -> PartialUpload:
        """Open one.

        Raises InvalidRequest, PayloadTooLarge, QuotaExceeded, RateLimited, StorageFull.
        """
        limit = self._config.max_adapter_file_bytes
        if num_bytes > limit:
            raise PayloadTooLarge(f"bytes: a file may have {limit}", param="bytes")
        return await self._background.on_disk(self._create, tenant, num_bytes, sha256)

    def _create(self, tenant: str, num_bytes: int, sha256: str) -> PartialUpload:
        self._blobs.storage.check_file(tenant, num_bytes)
        return self._partial.create(tenant, num_bytes, sha256, self._config.upload_ttl_s)

    async def show(self, tenant: str, upload_id: str) -> tuple[PartialUpload, int]:
        """An upload and its offset: of what is durable, not of a part that is still coming."""
        upload, size = await self._background.on_disk(self._show, tenant, upload_id)
        before = self._busy.get(upload_id)
        return upload, size if before is None else before

    def _show(self, tenant: str, upload_id: str) -> tuple[PartialUpload, int]:
        upload = self._partial.get(tenant, upload_id)
        try:
            return upload, self._partial.offset(upload)
        except FileNotFoundError:  # being completed at this moment
            raise NotFound("no such upload", param="id", code="upload_not_found") from None

    async def append(
        self, tenant: str, upload_id: str, offset: int, declared: int, body: AsyncIterator[bytes]
    ) -> int:
        """Add a part at ``offset``; the new offset. ``declared``: the part's length, 0 if unknown.

        Raises UploadOffsetConflict, Conflict (upload_busy), PayloadTooLarge (past the declared end:
        nothing of the part is kept) and StorageFull (neither). A part that breaks off is kept as
        far as it came; what broke it is raised.
        """
        upload = await self._background.on_disk(self._partial.get, tenant, upload_id)
        with self._alone(upload_id):
            upload, size = await self.show(tenant, upload_id)
            if offset != size:
                raise UploadOffsetConflict(f"the upload stands at {size}", size)
            if size + declared > upload.num_bytes:
                raise PayloadTooLarge(
                    f"the upload was announced with {upload.num_bytes} bytes", param="bytes"
                )
            self._busy[upload_id] = size
            file = await self._background.on_uploads(self._partial.open, upload)
            writer = AppendWriter(file, upload.num_bytes, self._background.uploads)
            try:
                async for piece in body:
                    await writer.write(piece)
            except (PayloadTooLarge, StorageFull):
                await writer.undo()
                raise
            except BaseException:
                await writer.keep()
                raise
            return await writer.keep()

    async def complete(self, tenant: str, upload_id: str) -> PartialUpload:
        """Make a blob of it.

        Raises Conflict (upload_incomplete, upload_busy), StorageFull, and InvalidRequest
        (digest_mismatch), after which the upload is gone.
        """
        upload = await self._background.on_disk(self._partial.get, tenant, upload_id)
        with self._alone(upload_id):
            upload, size = await self.show(tenant, upload_id)
            if size != upload.num_bytes:
                raise UploadOffsetConflict(
                    f"{size} of {upload.num_bytes} bytes have arrived",
                    size,
                    code="upload_incomplete",
                )
            self._blobs.holds.hold(upload.sha256)
            try:
                await self._background.on_uploads(self._partial.publish, upload, self._store)
                ttl_s = self._config.blob_ttl_s
                await self._background.on_disk(self._partial.settle, upload, ttl_s)
            except InvalidRequest:
                await self._background.on_disk(self._partial.remove, upload_id)
                raise
            finally:
                self._blobs.let_go(upload.sha256)
        return upload

    async def cancel(self, tenant: str, upload_id: str) -> None:
        """Forget it and what has arrived. Raises Conflict (upload_busy) too."""
        await self._background.on_disk(self._partial.get, tenant, upload_id)
        with self._alone(upload_id):
            await self._background.on_disk(self._partial.remove, upload_id)

    async def sweep(self) -> None:
        """Uploads whose time is over go; one that is being written to, at the next sweep."""
        for upload_id in await self._background.on_disk(self._partial.expired):
            if upload_id not in self._busy:
                with self._alone(upload_id):
                    await self._background.on_disk(self._partial.remove, upload_id)

    @contextmanager
    def _alone(self, upload_id: str) -> Iterator[None]:
        if upload_id in self._busy:
            raise Conflict(
                "another request is writing to this upload",
                param="id",
                code="upload_busy",
                retry_after_s=1,
            )
        self._busy[upload_id] = None
        try:
            yield
        finally:
            del self._busy[upload_id]
