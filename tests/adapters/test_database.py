"""A registry of an older server opens with everything it had, or is left as it was."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from loramux.adapters import database
from loramux.adapters.aliases import Aliases, Target
from loramux.adapters.database import MIGRATIONS, SCHEMA_VERSION, Database
from loramux.adapters.registry import Registry
from loramux.errors import ConfigError

VERSION_1 = """
BEGIN IMMEDIATE;
CREATE TABLE names (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    last_generation INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    generation INTEGER NOT NULL,
    digest TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    weights_digest TEXT NOT NULL,
    fingerprint TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL CHECK (status IN ('validating', 'ready', 'failed', 'deleting')),
    error TEXT NOT NULL DEFAULT 'null',
    report TEXT NOT NULL DEFAULT '{}',
    pinned INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    UNIQUE (tenant, name, generation)
) STRICT;
CREATE INDEX adapters_digest ON adapters (digest);
PRAGMA application_id = 1819112824;
PRAGMA user_version = 1;
INSERT INTO names VALUES ('', 'cat', 3);
INSERT INTO adapters (tenant, name, generation, digest, config_digest, weights_digest, fingerprint,
    status, report, pinned, created)
    VALUES ('', 'cat', 3, 'd', 'c', 'w', 'base', 'ready', '{"rank":4}', 1, 5.0);
COMMIT;
"""
"""What a server of version 1 wrote, character for character."""

VERSION_2 = VERSION_1.replace(
    "PRAGMA user_version = 1;",
    """
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
PRAGMA user_version = 2;
INSERT INTO tenant_blobs VALUES ('', 'w', 7, 9e9);
""",
)
"""What a server of version 2 wrote."""


@pytest.fixture(params=[VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    db = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    db.executescript(request.param)
    db.close()
    return tmp_path


def version(data_dir: Path) -> tuple[int, set[str]]:
    db = sqlite3.connect(data_dir / "registry.sqlite")
    number = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    db.close()
    return number, tables


def test_an_old_registry_keeps_its_rows(old: Path) -> None:
    granted = version(old)[0] == 2
    registry = Registry(old)
    row = registry.get("cat")
    assert (row.generation, row.pinned, row.report, row.created) == (3, True, {"rank": 4}, 5.0)
    assert row.expires is None and row.base == "target"
    blobs = registry.database.connection.execute("SELECT digest FROM tenant_blobs").fetchall()
    assert [digest for (digest,) in blobs] == ["w"] * granted
    aliases = Aliases(registry.database)
    assert aliases.every() == []
    aliases.set("prod", [Target(name="cat", generation=3, digest="d")])
    registry.close()
    number, tables = version(old)
    assert number == SCHEMA_VERSION and {"tenant_blobs", "uploads", "aliases"} <= tables
    Registry(old).close()  # and again, with nothing left to do


def test_a_new_registry_and_a_migrated_one_are_the_same(old: Path, tmp_path: Path) -> None:
    Registry(old).close()
    Registry(tmp_path / "new").close()
    assert version(old) == version(tmp_path / "new")


def test_a_migration_that_breaks_off_changes_nothing(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = version(old)
    for number in range(first[0] + 1, SCHEMA_VERSION + 1):
        with monkeypatch.context() as patch:
            steps = f"{MIGRATIONS[number]} INSERT INTO nowhere VALUES (1);"
            patch.setitem(database.MIGRATIONS, number, steps)
            with pytest.raises(ConfigError, match="cannot be used"):
                Database(old)
        assert version(old)[0] == number - 1
        assert number > first[0] + 1 or version(old) == first
    registry = Registry(old)
    assert registry.get("cat").generation == 3
    registry.close()
