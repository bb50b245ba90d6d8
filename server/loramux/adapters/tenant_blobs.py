"""Which tenant may name which blob before an adapter of theirs does.

Identical bytes are one file on disk, whoever sent them, but whether a blob exists is answered per
tenant: else the question alone would tell what others have uploaded. A row is made when the whole
bytes came from that tenant, and lives until ``expires`` (Unix seconds).
"""

from __future__ import annotations

import sqlite3
import time

from loramux.adapters.blobs import check_digest
from loramux.adapters.database import Database


def grant(db: sqlite3.Connection, tenant: str, digest: str, num_bytes: int, ttl_s: float) -> None:
    """Within a transaction: the tenant has sent these bytes. Again renews."""
    db.execute(
        "INSERT INTO tenant_blobs VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET expires = max(expires, excluded.expires)",
        (tenant, check_digest(digest), num_bytes, time.time() + ttl_s),
    )


class TenantBlobs:
    """The table. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def grant(self, tenant: str, digest: str, num_bytes: int, ttl_s: float) -> None:
        """The tenant has sent these bytes, and may name them for ``ttl_s``."""
        with self._database.transaction() as db:
            grant(db, tenant, digest, num_bytes, ttl_s)

    def has(self, tenant: str, digest: str) -> bool:
        """Whether the tenant may name the blob."""
        query = "SELECT 1 FROM tenant_blobs WHERE tenant = ? AND digest = ? AND expires > ?"
        with self._database.reading() as db:
            found = db.execute(query, (tenant, check_digest(digest), time.time())).fetchone()
            return found is not None

    def uses(self, digest: str) -> bool:
        """Whether any tenant may still name the blob."""
        query = "SELECT 1 FROM tenant_blobs WHERE digest = ? LIMIT 1"
        with self._database.reading() as db:
            return db.execute(query, (check_digest(digest),)).fetchone() is not None

    def waiting_bytes(self, tenant: str, *, but: tuple[str, str] = ("", "")) -> int:
        """Bytes the tenant keeps here beside its adapters: blobs that none of them needs, ``but``
        two, and what open uploads have announced."""
        query = """
            SELECT num_bytes FROM tenant_blobs AS blob
            WHERE tenant = ?1 AND expires > ?2 AND digest NOT IN (?3, ?4) AND NOT EXISTS (
                SELECT 1 FROM adapters WHERE tenant = ?1 AND status NOT IN ('failed', 'deleting')
                AND blob.digest IN (config_digest, weights_digest, heads_digest))
            UNION ALL SELECT num_bytes FROM uploads WHERE tenant = ?1 AND expires > ?2
        """
        with self._database.reading() as db:
            values = (tenant, time.time(), *but)
            return sum(num_bytes for (num_bytes,) in db.execute(query, values))

    def sweep(self) -> set[str]:
        """Drop the rows that have expired; whose blobs those were."""
        with self._database.transaction() as db:
            gone = "DELETE FROM tenant_blobs WHERE expires <= ? RETURNING digest"
            return {digest for (digest,) in db.execute(gone, (time.time(),)).fetchall()}
