"""Names that stand for adapters, or for shares of several: a row each, swapped in a transaction.

An alias has revisions, counted from 1 and never used twice, also not by a later alias of the name:
what one has read and wants to replace is still what is there. It lives in the same file as the
adapters, so neither takes the other's name, and what it points to does not vanish under it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from loramux.adapters.database import Database
from loramux.errors import Conflict, NotFound, QuotaExceeded

MAX_ALIASES = 1000
"""Aliases of one tenant."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter an alias stands for, and the weight of its share.

    ``owner`` is the tenant that has it. ``generation`` 0 with no ``digest`` follows the name: its
    newest generation that can serve. ``name`` "" is the base model, whatever it is called.
    """

    owner: str = ""
    name: str = ""
    generation: int = 0
    digest: str = ""
    weight: int = 1

    @property
    def follows(self) -> bool:
        """Whether a new generation of the name takes its place."""
        return bool(self.name) and not self.generation


class AliasRow(msgspec.Struct, frozen=True, kw_only=True):
    """An alias now. One without targets was removed; ``changed`` is Unix seconds."""

    tenant: str
    name: str
    revision: int
    targets: tuple[Target, ...]
    changed: float


_TARGETS = msgspec.json.Decoder(tuple[Target, ...])


class Aliases:
    """The aliases of one data directory. What a method returned survives a power cut."""

    def __init__(self, database: Database) -> None:
        self._transaction, self._reading = database.transaction, database.reading

    def set(
        self,
        name: str,
        targets: Sequence[Target],
        *,
        expected_revision: int | None = None,
        tenant: str = "",
    ) -> tuple[AliasRow, int]:
        """Point an alias at ``targets``; the row, and the revision that it had before (0: none).

        The same targets are the same revision. Raises Conflict: revision_conflict, name_reserved
        (an adapter of the tenant has the name), adapter_not_ready (a target went meanwhile); and
        QuotaExceeded.
        """
        with self._transaction() as db:
            row = _find(db, tenant, name)
            before = row.revision if row and row.targets else 0
            if row is not None and before and row.targets == tuple(targets):
                return row, before
            if expected_revision is not None and expected_revision != before:
                raise Conflict(
                    f"the current revision is {before}, not the expected one",
                    param="expected_revision",
                    code="revision_conflict",
                )
            if not before:
                _check_new(db, tenant, name)
            for target in targets:
                _check_target(db, target)
            return self._write(db, tenant, name, targets), before

    def remove(self, name: str, *, tenant: str = "") -> AliasRow:
        """The alias is no more; the row, without targets. Raises NotFound."""
        with self._transaction() as db:
            row = _find(db, tenant, name)
            if row is None or not row.targets:
                raise NotFound("no such alias", param="alias")
            return self._write(db, tenant, name, ())

    def _write(
        self, db: sqlite3.Connection, tenant: str, name: str, targets: Sequence[Target]
    ) -> AliasRow:
        db.execute(
            "INSERT INTO aliases VALUES (?, ?, 1, ?, ?) ON CONFLICT DO UPDATE SET"
            " revision = revision + 1, targets = excluded.targets, changed = excluded.changed",
            (tenant, name, msgspec.json.encode(targets).decode(), time.time()),
        )
        row = _find(db, tenant, name)
        assert row is not None
        return row

    def get(self, name: str, *, tenant: str = "") -> AliasRow | None:
        """The alias; None when there is none."""
        with self._reading() as db:
            row = _find(db, tenant, name)
            return row if row and row.targets else None

    def every(self) -> list[AliasRow]:
        """Every alias of every tenant."""
        with self._reading() as db:
            return _select(db, "WHERE targets != '[]' ORDER BY tenant, name", ())


def aliases_of(db: sqlite3.Connection, tenant: str) -> list[AliasRow]:
    """A tenant's aliases, within a transaction."""
    return _select(db, "WHERE tenant = ? AND targets != '[]' ORDER BY name", (tenant,))


def _check_new(db: sqlite3.Connection, tenant: str, name: str) -> None:
    taken = "SELECT 1 FROM adapters WHERE tenant = ? AND name = ? AND status != 'deleting'"
    if db.execute(taken, (tenant, name)).fetchone():
        raise Conflict("an adapter has this name", param="alias", code="name_reserved")
    count = "SELECT count(*) FROM aliases WHERE tenant = ? AND targets != '[]'"
    if db.execute(count, (tenant,)).fetchone()[0] >= MAX_ALIASES:
        raise QuotaExceeded(f"this tenant has {MAX_ALIASES} aliases: delete some first")


def _check_target(db: sqlite3.Connection, target: Target) -> None:
    if not target.name:
        return
    ready = (
        "SELECT 1 FROM adapters WHERE tenant = ?1 AND name = ?2 AND status = 'ready'"
        " AND base = 'target'"
        " AND (?3 = 0 OR (generation = ?3 AND digest = ?4))"
    )
    key = (target.owner, target.name, target.generation, target.digest)
    if not db.execute(ready, key).fetchone():
        raise Conflict(
            f"the adapter {target.name!r} was deleted meanwhile", code="adapter_not_ready"
        )


def _find(db: sqlite3.Connection, tenant: str, name: str) -> AliasRow | None:
    return next(iter(_select(db, "WHERE tenant = ? AND name = ?", (tenant, name))), None)


def _select(db: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[AliasRow]:
    return [
        AliasRow(**{**dict(record), "targets": _TARGETS.decode(record["targets"])})
        for record in db.execute("SELECT * FROM aliases " + where, values)
    ]
