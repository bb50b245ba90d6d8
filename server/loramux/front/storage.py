"""What a tenant has stored, and whether more may join it."""

from __future__ import annotations

from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.registry import Registry, Rows
from loramux.adapters.tenant_blobs import TenantBlobs
from loramux.front.quotas import Quotas


class Storage:
    """A tenant's adapters, files that wait for one and uploads that are open, against its limits.

    Called on the registry's thread, so that no two take the last place. Everything raises
    QuotaExceeded. Adapters that failed have no files and are counted by themselves.
    """

    def __init__(
        self, registry: Registry, store: BlobStore, granted: TenantBlobs, quotas: Quotas
    ) -> None:
        self._registry, self._store = registry, store
        self._granted, self._quotas = granted, quotas

    def check_adapter(self, tenant: str, name: str, files: tuple[str, str, str, str]) -> None:
        """Whether the adapter of these files (config, weights, profile, heads) may be registered.
        Of their bytes those of weights and heads count."""
        rows = self._registry.list(tenant=tenant)
        held, digest = _held(rows), adapter_digest(*files)
        if any(row.name == name and row.digest == digest for row in held):
            return  # nothing is added
        failed = [row for row in rows if row.status == "failed" and row.name != name]
        self._quotas.check_adapters(tenant, len(held), "adapters, every generation counted,")
        self._quotas.check_adapters(tenant, len(failed), "adapters that failed")
        large = (files[1], files[3])
        self._check_bytes(tenant, held, self._sizes(large), but=large)

    def check_file(self, tenant: str, num_bytes: int) -> None:
        """Whether a file of this size may be kept until an adapter uses it."""
        self._check_bytes(tenant, _held(self._registry.list(tenant=tenant)), num_bytes)

    def _sizes(self, files: tuple[str, str]) -> int:
        return sum(self._store.size(digest) for digest in files if digest)

    def _check_bytes(
        self, tenant: str, held: Rows, num_bytes: int, but: tuple[str, str] = ("", "")
    ) -> None:
        used = sum(self._sizes((row.weights_digest, row.heads_digest)) for row in held)
        used += self._granted.waiting_bytes(tenant, but=but)
        self._quotas.check_bytes(tenant, used, num_bytes)


def _held(rows: Rows) -> Rows:
    return [row for row in rows if row.status not in ("failed", "deleting")]
