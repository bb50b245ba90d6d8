"""Which adapters exist: one SQLite table, one transaction per change of state.

    create -> validating -> ready -> deleting -> (row gone)
                         `-> failed

A name has generations, counted from 1 and never used twice. Several may be ready at once; a bare
name means the newest that can serve. Which base an adapter was validated against is part of its
row: under another base it is listed as ``incompatible``, which is derived, never stored. A name is
for one of the server's models (``base``) as long as it holds an adapter.

A generation may have a time to live. When that is over it is deleted, even if it is pinned, but not
while an alias holds it: then it stays until the alias lets go.
What a method returned survives a power cut (see ``database``).
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from loramux.adapters.aliases import AliasRow, aliases_of
from loramux.adapters.blobs import adapter_digest, check_digest
from loramux.adapters.database import Database
from loramux.errors import Conflict, GenerationGone, InvalidRequest, NotFound, in_short
from loramux.request import Role

Status = Literal["validating", "ready", "failed", "deleting", "incompatible"]

MIN_PREFIX = 12
"""Fewest hex digits that may name a version by its digest."""


class AdapterRow(msgspec.Struct, frozen=True, kw_only=True):
    """One generation of a name.

    ``base`` is the one of the server's models it is for, ``fingerprint`` says what that was
    when the adapter was validated ("" before that). ``error`` is ``{"code", "message",
    "problems"}`` when failed; ``report`` is IngestDone's when ready;
    ``created`` and ``expires`` are Unix seconds.
    """

    id: int
    tenant: str
    name: str
    generation: int
    digest: str
    config_digest: str
    weights_digest: str
    fingerprint: str
    status: Status
    error: dict[str, Any] | None
    report: dict[str, Any]
    pinned: bool
    created: float
    expires: int | None = None
    profile_digest: str = ""
    base: Role = "target"
    heads_digest: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The digests of its blobs: config, weights, and the profile and heads if it has any."""
        files = (self.config_digest, self.weights_digest, self.profile_digest, self.heads_digest)
        return tuple(filter(None, files))


Rows = list[AdapterRow]


class Registry:
    """The adapters of one data directory.

    ``base_fingerprint`` is the base being served, once known, and ``partner_fingerprints`` are
    those of the other models there are; they decide what is incompatible.
    Every method is one transaction; calls from several threads take turns. A disk that refuses to
    write raises StorageFull.
    """

    def __init__(self, data_dir: Path) -> None:
        self.base_fingerprint = ""
        self.partner_fingerprints: Mapping[Role, str] = {}
        self.database = Database(data_dir)
        self._transaction, self._reading = self.database.transaction, self.database.reading

    def close(self) -> None:
        """Close the file. The registry cannot be used afterwards."""
        self.database.close()

    def create(
        self,
        name: str,
        *,
        config_digest: str,
        weights_digest: str,
        profile_digest: str = "",
        heads_digest: str = "",
        expected_generation: int | None = None,
        ttl_s: int | None = None,
        tenant: str = "",
        blend: Mapping[str, Any] | None = None,
        base: Role = "target",
    ) -> tuple[AdapterRow, bool]:
        """Give a name an adapter; the row, and whether it has yet to be validated.

        The same files under the same name are the same row: nothing happens (a failed one is tried
        again). Other files need ``expected_generation``, the generation being replaced (0: the name
        must be free), else Conflict; they become the next generation, and the old one stays until
        deleted. A failed or incompatible adapter does not hold its name. With ``ttl_s`` the row,
        also one that was there, lives that many seconds from now. An alias's name is reserved, and
        so is that of an adapter for another model than ``base``, unless it failed.
        ``blend``: how the files were made here; it stays in the report.
        """
        files = (config_digest, weights_digest, profile_digest, heads_digest)
        digest = adapter_digest(*files)
        with self._transaction() as db:
            aliases = self._expire(db, tenant, name)
            if any(alias.name == name for alias in aliases):
                raise Conflict("an alias has this name", param="name", code="name_reserved")
            rows = [r for r in self._rows(db, tenant, name) if r.status != "deleting"]
            _check_base(rows, base)
            held = next((r for r in rows if r.status in ("validating", "ready")), None)
            if held is not None and held.digest == digest:
                return self._renew(db, held.id, ttl_s), False
            if rows and rows[0].status == "failed" and rows[0].digest == digest:
                db.execute(
                    "UPDATE adapters SET status = 'validating', error = 'null', base = ?"
                    " WHERE id = ?",
                    (base, rows[0].id),
                )
                return self._renew(db, rows[0].id, ttl_s), True
            current = held.generation if held else 0
            if expected_generation is None and held is not None:
                raise Conflict(
                    f"this name holds another version; expected_generation {current} replaces them",
                    param="name",
                )
            if expected_generation is not None and expected_generation != current:
                raise Conflict(
                    f"the current generation is {current}, not the expected one",
                    param="expected_generation",
                )
            db.execute(
                "DELETE FROM adapters WHERE tenant = ? AND name = ? AND status = 'failed'",
                (tenant, name),
            )
            row = self._insert(db, tenant, name, digest, files, base)
            if blend is not None:
                report = _json({"blend": blend})
                db.execute("UPDATE adapters SET report = ? WHERE id = ?", (report, row.id))
            return self._renew(db, row.id, ttl_s), True

    def _insert(
        self,
        db: sqlite3.Connection,
        tenant: str,
        name: str,
        digest: str,
        files: tuple[str, str, str, str],
        base: Role,
    ) -> AdapterRow:
        (generation,) = db.execute(
            "INSERT INTO names VALUES (?, ?, 1) ON CONFLICT DO UPDATE"
            " SET last_generation = last_generation + 1 RETURNING last_generation",
            (tenant, name),
        ).fetchone()
        cursor = db.execute(
            "INSERT INTO adapters (tenant, name, generation, digest, config_digest, weights_digest,"
            " profile_digest, heads_digest, base, status, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'validating', ?)",
            (tenant, name, generation, digest, *files, base, time.time()),
        )
        assert cursor.lastrowid is not None
        return self._row(db, cursor.lastrowid)

    def _renew(self, db: sqlite3.Connection, row_id: int, ttl_s: int | None) -> AdapterRow:
        if ttl_s is not None:
            db.execute("UPDATE adapters SET expires = ? WHERE id = ?", (_end(ttl_s), row_id))
        return self._row(db, row_id)

    def set_ttl(
        self, name: str, generation: int, ttl_s: int | None, *, tenant: str = ""
    ) -> AdapterRow:
        """Have one generation live that many seconds from now, or for ever (None).

        Raises NotFound and GenerationGone, also for one whose time is over already.
        """
        with self._transaction() as db:
            self._expire(db, tenant, name)
            rows = self._of_generation(db, self._visible(db, tenant, name), generation)
            row = best(rows)
            expires = None if ttl_s is None else _end(ttl_s)
            db.execute("UPDATE adapters SET expires = ? WHERE id = ?", (expires, row.id))
            return self._row(db, row.id)

    def expire(self) -> Rows:
        """Mark every generation whose time is over ``deleting``; all that are, of every tenant."""
        with self._transaction() as db:
            over = "SELECT DISTINCT tenant, name FROM adapters WHERE expires <= ?"
            for tenant, name in db.execute(over, (time.time(),)).fetchall():
                self._expire(db, tenant, name)
            return self._select(db, "WHERE status = 'deleting'", ())

    def _expire(self, db: sqlite3.Connection, tenant: str, name: str) -> list[AliasRow]:
        """Mark the generations of a name whose time is over; the tenant's aliases.

        A pin stays on the row: it says that the engine is still to be told of its end.
        """
        aliases, now = aliases_of(db, tenant), time.time()
        rows = [r for r in self._rows(db, tenant, name) if r.status != "deleting"]
        for row in rows:
            if row.expires is not None and row.expires <= now and not holders(row, rows, aliases):
                db.execute("UPDATE adapters SET status = 'deleting' WHERE id = ?", (row.id,))
        return aliases

    def mark_ready(self, row_id: int, *, fingerprint: str, report: dict[str, Any]) -> AdapterRow:
        """The adapter passed validation against that base. A pin of its name moves to it.

        One whose time is over by now is ``deleting`` instead. Raises NotFound when the adapter was
        deleted meanwhile.
        """
        with self._transaction() as db:
            row = self._live(db, row_id)
            self._expire(db, row.tenant, row.name)
            if (row := self._row(db, row_id)).status == "deleting":
                return row
            if "blend" in row.report:
                report = {**report, "blend": row.report["blend"]}
            of_name = (
                "FROM adapters WHERE tenant = ? AND name = ? AND generation < ?"
                " AND status != 'deleting'"
            )
            key = (row.tenant, row.name, row.generation)
            (pinned,) = db.execute(f"SELECT coalesce(max(pinned), 0) {of_name}", key).fetchone()
            db.execute(
                "UPDATE adapters SET pinned = 0 WHERE id IN (SELECT id " + of_name + ")", key
            )
            db.execute(
                "UPDATE adapters SET status = 'ready', fingerprint = ?, report = ?, error = 'null',"
                " pinned = max(pinned, ?) WHERE id = ?",
                (fingerprint, _json(report), pinned, row_id),
            )
            return self._row(db, row_id)

    def mark_failed(self, row_id: int, *, code: str, problems: Sequence[str]) -> AdapterRow:
        """The adapter did not pass, or its files are no longer whole.

        Raises NotFound when the adapter was deleted meanwhile.
        """
        error = {"code": code, "message": in_short(problems), "problems": list(problems)}
        with self._transaction() as db:
            self._live(db, row_id)
            db.execute(
                "UPDATE adapters SET status = 'failed', error = ? WHERE id = ?",
                (_json(error), row_id),
            )
            return self._row(db, row_id)

    def get(
        self,
        name: str,
        *,
        generation: int | None = None,
        digest_prefix: str | None = None,
        tenant: str = "",
    ) -> AdapterRow:
        """The row a name means: the newest ready generation, else the newest of any status.

        With ``generation``: that one. With ``digest_prefix`` (12 to 64 hex digits): the best of the
        generations with that digest. Raises NotFound (also for a prefix that two versions share)
        and GenerationGone. Adapters being deleted are not found.
        """
        with self._reading() as db:
            rows = self._visible(db, tenant, name)
            if generation is not None:
                rows = self._of_generation(db, rows, generation)
            if digest_prefix is not None:
                rows = [r for r in rows if r.digest.startswith(digest_prefix)]
                if len(digest_prefix) < MIN_PREFIX or len({r.digest for r in rows}) > 1:
                    raise NotFound("the digest is too short to name one version", param="model")
            return best(rows)

    def list(self, name: str | None = None, *, tenant: str = "") -> Rows:
        """Every row (of one name), by name, newest generation first."""
        with self._reading() as db:
            if name is not None:
                return self._rows(db, tenant, name)
            return self._select(db, "WHERE tenant = ? ORDER BY name, generation DESC", (tenant,))

    def every(self) -> Rows:
        """Every row of every tenant, newest generation of a name first."""
        with self._reading() as db:
            return self._select(db, "ORDER BY tenant, name, generation DESC", ())

    def delete(self, name: str, *, generation: int | None = None, tenant: str = "") -> Rows:
        """Mark a generation of a name, or every one, ``deleting``; the rows. ``forget`` ends each.

        Raises NotFound, GenerationGone, and Conflict: adapter_pinned, adapter_aliased (an alias of
        the tenant holds one of them; the message names it).
        """
        with self._transaction() as db:
            aliases = self._expire(db, tenant, name)
            rows = chosen = self._visible(db, tenant, name)
            if generation is not None:
                chosen = self._of_generation(db, rows, generation)
            if not chosen:
                raise NotFound("no such adapter", param="model")
            if any(r.pinned for r in chosen):
                raise Conflict("the adapter is pinned: unpin it first", code="adapter_pinned")
            if held_by := sorted({name for r in chosen for name in holders(r, rows, aliases)}):
                raise Conflict(
                    f"the adapter is what an alias stands for ({', '.join(held_by)}): point it"
                    " elsewhere first",
                    code="adapter_aliased",
                )
            for row in chosen:
                db.execute("UPDATE adapters SET status = 'deleting' WHERE id = ?", (row.id,))
            return [self._row(db, r.id) for r in chosen]

    def forget(self, row_id: int) -> None:
        """Remove a row for good. Its generation number is not used again."""
        with self._transaction() as db:
            db.execute("DELETE FROM adapters WHERE id = ?", (row_id,))

    def set_pinned(self, name: str, pinned: bool, *, tenant: str = "") -> AdapterRow:
        """Pin or unpin what the bare name means (the same row as ``get``).

        Raises NotFound, InvalidRequest for one that is not for the target model, and Conflict
        (adapter_not_ready) unless it is ready.
        """
        with self._transaction() as db:
            self._expire(db, tenant, name)
            row = best(self._visible(db, tenant, name))
            if row.base != "target":
                raise InvalidRequest(
                    f"the adapter is for the {row.base} model, whose adapters cannot be pinned",
                    param="name",
                )
            if row.status != "ready":
                raise Conflict(f"the adapter is {row.status}", code="adapter_not_ready")
            db.execute("UPDATE adapters SET pinned = ? WHERE id = ?", (int(pinned), row.id))
            return self._row(db, row.id)

    def uses_blob(self, digest: str, *, tenant: str | None = None) -> bool:
        """Whether any row, of any tenant or of this one, still needs this blob. One that failed
        needs none, also when it is being deleted: trying it again brings its files."""
        check_digest(digest)
        with self._reading() as db:
            query = (
                "SELECT 1 FROM adapters"
                " WHERE ?1 IN (config_digest, weights_digest, profile_digest, heads_digest)"
                " AND error = 'null' AND (?2 IS NULL OR tenant = ?2) LIMIT 1"
            )
            return db.execute(query, (digest, tenant)).fetchone() is not None

    def uses_adapter(self, digest: str) -> bool:
        """Whether any row, of any tenant, is this adapter version: its packed file is needed."""
        with self._reading() as db:
            query = "SELECT 1 FROM adapters WHERE digest = ? LIMIT 1"
            return db.execute(query, (check_digest(digest),)).fetchone() is not None

    def uses_basis(self, digest: str) -> bool:
        """Whether any row, of any tenant, was found to share this basis."""
        with self._reading() as db:
            query = "SELECT 1 FROM adapters WHERE json_extract(report, '$.basis.digest') = ?"
            return db.execute(query, (check_digest(digest),)).fetchone() is not None

    def _visible(self, db: sqlite3.Connection, tenant: str, name: str) -> Rows:
        rows = [r for r in self._rows(db, tenant, name) if r.status != "deleting"]
        if not rows:
            raise NotFound("no such adapter", param="model")
        return rows

    def _of_generation(self, db: sqlite3.Connection, rows: Rows, generation: int) -> Rows:
        found = [r for r in rows if r.generation == generation]
        (last,) = db.execute(
            "SELECT last_generation FROM names WHERE tenant = ? AND name = ?",
            (rows[0].tenant, rows[0].name),
        ).fetchone()
        if not found and 1 <= generation <= last:
            raise GenerationGone("this generation no longer exists", param="model")
        return found

    def _rows(self, db: sqlite3.Connection, tenant: str, name: str) -> Rows:
        where = "WHERE tenant = ? AND name = ? ORDER BY generation DESC"
        return self._select(db, where, (tenant, name))

    def _row(self, db: sqlite3.Connection, row_id: int) -> AdapterRow:
        return self._select(db, "WHERE id = ?", (row_id,))[0]

    def _live(self, db: sqlite3.Connection, row_id: int) -> AdapterRow:
        rows = self._select(db, "WHERE id = ? AND status != 'deleting'", (row_id,))
        if not rows:
            raise NotFound("the adapter was deleted", param="name")
        return rows[0]

    def _select(self, db: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> Rows:
        return [
            self._read(record) for record in db.execute("SELECT * FROM adapters " + where, values)
        ]

    def _read(self, record: sqlite3.Row) -> AdapterRow:
        fields = dict(record)
        fields["error"] = msgspec.json.decode(fields["error"])
        fields["report"] = msgspec.json.decode(fields["report"])
        fields["pinned"] = bool(fields["pinned"])
        row = AdapterRow(**fields)
        return replace(row, status="incompatible") if self._is_incompatible(row) else row

    def _is_incompatible(self, row: AdapterRow) -> bool:
        """Also while it is being validated, when there is nothing to validate it against."""
        if not self.base_fingerprint:
            return False
        known = {"target": self.base_fingerprint, **self.partner_fingerprints}
        served = known.get(row.base, "")
        if row.status == "validating":
            return not served
        return row.status == "ready" and row.fingerprint != served


def holders(row: AdapterRow, rows: Rows, aliases: Iterable[AliasRow]) -> list[str]:
    """The aliases that keep a generation from being deleted: those pointed at it, and, when it is
    the one that the bare name means among ``rows`` (newest first), those that follow the name."""
    return [
        alias.name
        for alias in aliases
        for target in alias.targets
        if (target.owner, target.name) == (row.tenant, row.name)
        and (row.id == best(rows).id if target.follows else row.generation == target.generation)
    ]


def _check_base(rows: Rows, base: Role) -> None:
    for row in rows:
        if row.base != base and row.status != "failed":
            raise Conflict(
                f"this name holds an adapter for the {row.base} model: delete that first",
                param="base",
                code="name_reserved",
            )


def best(rows: Rows) -> AdapterRow:
    """Of rows newest first: the newest ready one, else the newest. Raises NotFound for no rows."""
    if not rows:
        raise NotFound("no such adapter", param="model")
    return next((r for r in rows if r.status == "ready"), rows[0])


def _end(ttl_s: int) -> int:
    return math.ceil(time.time() + ttl_s)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
