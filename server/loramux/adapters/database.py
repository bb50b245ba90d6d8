"""The one SQLite file of a data directory: its schema, migrations and transactions.

WAL with synchronous=FULL: what a transaction wrote survives a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from loramux.adapters.blobs import disk_errors, make_durable_dir
from loramux.errors import ConfigError, StorageFull

_APPLICATION_ID = 0x6C6D7578  # "lmux": tells our file from any other SQLite database
_FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}

MIGRATIONS = {
    1: f"""
CREATE TABLE names (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    last_generation INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so a late verdict finds nobody
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    generation INTEGER NOT NULL,
    digest TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    weights_digest TEXT NOT NULL,
    fingerprint TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL CHECK (status IN ('validating', 'ready', 'failed', 'deleting')),
    error TEXT NOT NULL DEFAULT 'null',
    report TEXT NOT NULL DEFAULT '{{}}',
    pinned INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    UNIQUE (tenant, name, generation)
) STRICT;
CREATE INDEX adapters_digest ON adapters (digest);
PRAGMA application_id = {_APPLICATION_ID};
""",
    2: """
CREATE TABLE tenant_blobs (
    tenant TEXT NOT NULL,
    digest TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    expires REAL NOT NULL,
    PRIMARY KEY (tenant, digest)
) STRICT;
CREATE INDEX tenant_blobs_digest ON tenant_blobs (digest);
CREATE TABLE uploads (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL
) STRICT;
""",
    3: """
CREATE TABLE aliases (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    revision INTEGER NOT NULL,
    targets TEXT NOT NULL,
    changed REAL NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
ALTER TABLE adapters ADD COLUMN expires INTEGER;
""",
    4: "ALTER TABLE adapters ADD COLUMN profile_digest TEXT NOT NULL DEFAULT '';",
    5: """
ALTER TABLE adapters ADD COLUMN base TEXT NOT NULL DEFAULT 'target'
    CHECK (base IN ('target', 'draft', 'small'));
""",
    6: "ALTER TABLE adapters ADD COLUMN heads_digest TEXT NOT NULL DEFAULT '';",
}
"""What makes a database of each version out of one of the version before; each is a transaction."""

SCHEMA_VERSION = max(MIGRATIONS)


class Database:
    """The registry's file. Several tables' owners share it; their transactions take turns.

    Raises ConfigError when the file is not ours, damaged, locked, or of a newer server. A disk that
    refuses to write raises StorageFull from the transaction.
    """

    def __init__(self, data_dir: Path) -> None:
        self._lock = threading.Lock()
        with disk_errors():
            make_durable_dir(data_dir)
        self._path = data_dir / "registry.sqlite"
        try:
            self.connection = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self.connection.close()  # rolls back a migration that broke off
                raise
        except sqlite3.Error as error:
            raise ConfigError(
                f"the adapter registry {self._path} cannot be used: {error}"
            ) from error

    def _prepare(self) -> None:
        db = self.connection
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and owner != _APPLICATION_ID:
            raise ConfigError(f"{self._path} is not an adapter registry")
        if (damage := db.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise ConfigError(f"the adapter registry {self._path} is damaged: {damage}")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"the adapter registry {self._path} has schema version {version}; this server "
                f"knows up to {SCHEMA_VERSION}: use the newer server or another --data-dir"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        for number in range(version + 1, SCHEMA_VERSION + 1):
            steps = f"{MIGRATIONS[number]} PRAGMA user_version = {number};"
            db.executescript(f"BEGIN IMMEDIATE; {steps} COMMIT;")
        self._try_lock()

    def _try_lock(self) -> None:
        """Whoever holds the file now, a shell or a backup, would make every upload fail."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise ConfigError(
                    f"the adapter registry {self._path} is locked by another process"
                ) from error

    def close(self) -> None:
        """Close the file. It cannot be used afterwards."""
        with self._lock:
            self.connection.close()

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """One consistent look; takes no write lock, works on a full disk."""
        return self.transaction("BEGIN")

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """All of the block or, when it raises, nothing of it."""
        with self._lock:
            try:
                self.connection.execute(begin)
                try:
                    yield self.connection
                    self.connection.execute("COMMIT")
                finally:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                # Extended codes keep the kind in their low byte.
                if error.sqlite_errorcode & 0xFF in _FULL_CODES:
                    raise StorageFull("the adapter registry cannot be read or written") from error
                raise
