"""Files that tenants send before, and apart from, the adapters that use them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loramux.adapters.blobs import BlobStore, check_digest
from loramux.adapters.registry import AdapterRow, Registry
from loramux.adapters.tenant_blobs import TenantBlobs
from loramux.config import ServerConfig
from loramux.errors import NotFound, PayloadTooLarge
from loramux.front.background import Background
from loramux.front.holds import BlobHolds
from loramux.front.quotas import Quotas
from loramux.front.storage import Storage
from loramux.front.uploads import UploadWriter


class BlobService:
    """``HEAD`` and ``PUT /v1/blobs``, and what registrations ask of blobs.

    A tenant sees the blobs it has sent (for ``config.blob_ttl_s`` from the last time) and those of
    its adapters.
    """

    def __init__(
        self,
        config: ServerConfig,
        registry: Registry,
        store: BlobStore,
        background: Background,
        quotas: Quotas,
    ) -> None:
        self._config = config
        self._registry = registry
        self._store = store
        self._background = background
        self._granted = TenantBlobs(registry.database)
        self.storage = Storage(registry, store, self._granted, quotas)
        self.holds = BlobHolds(store, lambda d: registry.uses_blob(d) or self._granted.uses(d))

    async def begin(self, limit_bytes: int, param: str) -> UploadWriter:
        """Start receiving a blob. The caller calls its ``abort`` in the end, always."""
        writer = await self._background.on_uploads(self._store.writer, limit_bytes)
        threads = self._background.uploads
        return UploadWriter(writer, limit_bytes, param, threads, self.holds.hold, self.let_go)

    def let_go(self, digest: str) -> None:
        """The end of one hold; a blob that nobody needs goes."""
        if self.holds.let_go(digest):
            self._background.spawn(self.collect([digest]))

    async def collect(self, digests: list[str] | set[str]) -> None:
        """Delete those of these blobs that nobody needs."""
        for digest in digests:
            await self._background.on_disk(self.holds.collect, digest)

    def collect_all(self) -> None:
        """Remove what an earlier run left behind. On the registry's thread."""
        for digest in list(self._store.digests()):
            self.holds.collect(digest)

    def collect_files(self, row: AdapterRow) -> None:
        """Remove those of the adapter's files that nobody needs. On the registry's thread."""
        for digest in (row.config_digest, row.weights_digest):
            self.holds.collect(digest)

    async def put(
        self, tenant: str, digest: str, body: AsyncIterator[bytes], declared: int = 0
    ) -> bool:
        """Store a blob; whether it is new to the tenant. Every byte is read and hashed either way.
        ``declared``: its size, 0 if unknown, so that what cannot be kept is not read.

        Raises InvalidRequest (digest_malformed, digest_mismatch), PayloadTooLarge, QuotaExceeded,
        StorageFull.
        """
        await self._background.on_disk(self._is_known, tenant, check_digest(digest), declared)
        limit = self._config.max_adapter_file_bytes
        writer = await self.begin(limit, "body")
        try:
            async for piece in body:
                await writer.write(piece)
            await writer.commit(digest)
            return await self._background.on_disk(self._grant, tenant, digest, writer.num_bytes)
        finally:
            await writer.abort()

    def _is_known(self, tenant: str, digest: str, num_bytes: int) -> bool:
        """Whether the tenant has the blob; QuotaExceeded when it has not and has no room for it."""
        known = self._visible(tenant, digest)
        if not known:
            self.storage.check_file(tenant, num_bytes)
        return known

    def _grant(self, tenant: str, digest: str, num_bytes: int) -> bool:
        known = self._is_known(tenant, digest, num_bytes)
        self._granted.grant(tenant, digest, num_bytes, self._config.blob_ttl_s)
        return not known

    def _visible(self, tenant: str, digest: str) -> bool:
        if not self._granted.has(tenant, digest):
            if not self._registry.uses_blob(digest, tenant=tenant):
                return False
        return self._store.has(digest)

    def has(self, digest: str) -> bool:
        """Whether the bytes are here, whoever sent them. Certain for who holds them and asks on
        the registry's thread."""
        return self._store.has(digest)

    async def size(self, tenant: str, digest: str, param: str = "digest") -> int:
        """Bytes of a blob the tenant has. Raises NotFound (blob_not_found), and InvalidRequest."""
        return await self._background.on_disk(self._size, tenant, digest, param)

    def _size(self, tenant: str, digest: str, param: str) -> int:
        if not self._visible(tenant, check_digest(digest)):
            raise NotFound("no such blob", param=param, code="blob_not_found")
        return self._store.size(digest)

    @asynccontextmanager
    async def claim(self, tenant: str, digest: str, param: str) -> AsyncIterator[int]:
        """Within the block the tenant's blob stays; its size. Raises as ``size`` does."""
        check_digest(digest)
        self.holds.hold(digest)
        try:
            yield await self.size(tenant, digest, param)
        finally:
            self.let_go(digest)

    async def read_config(self, tenant: str, digest: str) -> bytes:
        """A blob that is to be an adapter_config.json. Raises PayloadTooLarge, and as ``size``."""
        async with self.claim(tenant, digest, "config") as num_bytes:
            if num_bytes > self._config.max_config_bytes:
                raise PayloadTooLarge(
                    f"config: exceeds {self._config.max_config_bytes} bytes", param="config"
                )
            return await self._background.on_uploads(self._store.path(digest).read_bytes)

    async def sweep(self) -> None:
        """Blobs that waited too long for an adapter go."""
        await self.collect(await self._background.on_disk(self._granted.sweep))
