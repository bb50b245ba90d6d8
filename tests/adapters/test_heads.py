"""Heads as a file of an adapter's version: its digest, its row, its blob, its bytes."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path

import pytest

from loramux.adapters.blobs import adapter_digest
from loramux.adapters.database import MIGRATIONS, SCHEMA_VERSION
from loramux.adapters.registry import Registry
from loramux.adapters.tenant_blobs import TenantBlobs
from loramux.errors import Conflict, InvalidRequest

A, B, C, D = (letter * 64 for letter in "abcd")


def test_they_are_part_of_the_digest() -> None:
    assert adapter_digest(A, B, C) == adapter_digest(A, B, C, "")
    assert adapter_digest(A, B) == adapter_digest(A, B, "", "")
    ways = [p + h for p in ((C,), (D,), ("",)) for h in ((C,), (D,), ("",))]
    assert len({adapter_digest(A, B, *way) for way in ways}) == len(ways), "which file it is counts"
    for files in itertools.product((A, "x" * 64), repeat=2):
        if files != (A, A):
            with pytest.raises(InvalidRequest):
                adapter_digest(A, B, *files)


def test_the_registry_keeps_them_and_counts_their_blob(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.create("x", config_digest=A, weights_digest=B)
    assert not registry.uses_blob(D)
    with pytest.raises(Conflict):  # the same weights that are guessed otherwise
        registry.create("x", config_digest=A, weights_digest=B, heads_digest=D)
    row, fresh = registry.create(
        "x", config_digest=A, weights_digest=B, heads_digest=D, expected_generation=1
    )
    assert fresh and row.generation == 2 and row.digest == adapter_digest(A, B, "", D)
    assert row.files == (A, B, D) and row.profile_digest == ""
    again, fresh = registry.create("x", config_digest=A, weights_digest=B, heads_digest=D)
    assert (again.id, fresh) == (row.id, False)
    both, _ = registry.create(
        "y", config_digest=A, weights_digest=B, profile_digest=C, heads_digest=D
    )
    assert both.files == (A, B, C, D)
    registry.forget(both.id)
    assert registry.uses_blob(D, tenant="") and not registry.uses_blob(D, tenant="other")
    registry.close()
    registry = Registry(tmp_path)
    assert registry.get("x", generation=2).heads_digest == D
    registry.forget(row.id)
    assert not registry.uses_blob(D) and registry.uses_blob(B)
    registry.close()


def test_what_a_tenant_sent_ahead_counts_once(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    granted = TenantBlobs(registry.database)
    for digest, size in ((B, 1), (D, 10), (C, 100)):
        granted.grant("acme", digest, size, 60)
    assert granted.waiting_bytes("acme") == 111
    assert granted.waiting_bytes("acme", but=(B, D)) == 100
    assert granted.waiting_bytes("acme", but=(B, "")) == 110
    registry.create("x", tenant="acme", config_digest=A, weights_digest=B, heads_digest=D)
    assert granted.waiting_bytes("acme") == 100
    registry.close()


def test_a_registry_from_before_has_none_and_takes_some(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    for version in range(1, 6):
        db.executescript(f"BEGIN; {MIGRATIONS[version]} PRAGMA user_version = {version}; COMMIT;")
    digest = adapter_digest(A, B, C)
    db.executescript(
        "INSERT INTO names VALUES ('', 'cat', 1); INSERT INTO adapters (tenant, name, generation,"
        " digest, config_digest, weights_digest, profile_digest, status, created)"
        f" VALUES ('', 'cat', 1, '{digest}', '{A}', '{B}', '{C}', 'ready', 5.0);"
    )
    db.close()
    assert SCHEMA_VERSION >= 6
    registry = Registry(tmp_path)
    row, fresh = registry.create("cat", config_digest=A, weights_digest=B, profile_digest=C)
    assert not fresh and row.heads_digest == "" and row.files == (A, B, C)
    row, fresh = registry.create(
        "cat",
        config_digest=A,
        weights_digest=B,
        profile_digest=C,
        heads_digest=D,
        expected_generation=1,
    )
    assert fresh and row.generation == 2 and registry.uses_blob(D)
    registry.close()
    Registry(tmp_path).close()
