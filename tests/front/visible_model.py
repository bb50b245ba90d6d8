"""What a server's tenants should see of their adapters, and what it should keep for them: the rules
in memory, without files, threads and processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from loramux.adapters.aliases import Target
from loramux.adapters.blobs import adapter_digest
from loramux.errors import InvalidRequest
from loramux.front.shares import choose

SHARED, BASE_NAME = "", "base"
OVER, LATER = 1, 2**40
"""The ends of lives: one in the past, one that no test sees."""
Status = Literal["validating", "ready", "failed", "deleting"]


class Refused(Exception):
    """The server says no, with this code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_good(config: bytes) -> bool:
    """What the scripted ingest process says of an adapter."""
    return b"bad" not in config


@dataclass(eq=False)
class Row:
    """One generation of a name. ``examined``: its verdict is awaited; ``refused``: it was bad, and
    the files went."""

    tenant: str
    name: str
    generation: int
    config: bytes
    weights: bytes
    status: Status = "validating"
    pinned: bool = False
    examined: bool = False
    refused: bool = False
    expires: int | None = None

    @property
    def digest(self) -> str:
        return adapter_digest(*self.files)

    @property
    def files(self) -> tuple[str, str]:
        return sha(self.config), sha(self.weights)


@dataclass(frozen=True)
class Alias:
    """What a name stands for since its last change."""

    tenant: str
    name: str
    revision: int
    targets: tuple[Target, ...]


@dataclass
class Model:
    """``granted`` maps (tenant, digest) to bytes; ``uploads`` an id to (tenant, file, offset);
    ``held`` counts files that an upload under way has brought; ``references`` requests by version;
    ``packed`` are the versions with a packed file, ``unpacked`` those that lost it; ``revisions``
    are the last ones, also of aliases that were removed."""

    rows: list[Row] = field(default_factory=list)
    last: Counter[tuple[str, str]] = field(default_factory=Counter)
    granted: dict[tuple[str, str], int] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bytes, int]] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    references: Counter[str] = field(default_factory=Counter)
    packed: set[str] = field(default_factory=set)
    unpacked: set[str] = field(default_factory=set)
    aliases: dict[tuple[str, str], Alias] = field(default_factory=dict)
    revisions: Counter[tuple[str, str]] = field(default_factory=Counter)

    # What is there.

    def of(self, tenant: str, name: str) -> list[Row]:
        """Newest generation first, those being deleted as well."""
        rows = [row for row in self.rows if (row.tenant, row.name) == (tenant, name)]
        return sorted(rows, key=lambda row: -row.generation)

    def living(self, tenant: str, name: str) -> list[Row]:
        """Those that nobody has deleted, also when their time is over."""
        return [row for row in self.of(tenant, name) if row.status != "deleting"]

    def is_over(self, row: Row) -> bool:
        return row.expires == OVER and not self.is_held(row)

    def is_held(self, row: Row) -> bool:
        """Whether an alias of its tenant stands for this generation."""
        return any(
            row is best(self.living(row.tenant, row.name))
            if target.follows
            else row.generation == target.generation
            for alias in self.aliases.values()
            for target in alias.targets
            if (alias.tenant, target.owner, target.name) == (row.tenant, row.tenant, row.name)
        )

    def visible(self, tenant: str, name: str) -> list[Row]:
        return [row for row in self.living(tenant, name) if not self.is_over(row)]

    def meant(self, tenant: str, name: str) -> list[Row]:
        """The visible generations of what the name means to a tenant: its own, else the shared."""
        return self.visible(tenant, name) or self.visible(SHARED, name)

    def serves(self, digest: str) -> bool:
        ready = any(row.digest == digest and row.status == "ready" for row in self.rows)
        return ready and digest not in self.unpacked

    def resolve(
        self, tenant: str, name: str, generation: int | None = None, user: str | None = None
    ) -> Row | None:
        """What answers; None: the base."""
        alias = self.alias(tenant, name) if generation is None else None
        if alias is None:
            return self.served(best(self.found(tenant, name, generation)))
        target = choose(alias.targets, tenant, name, user)
        if not target.name:
            return None
        if (row := self.meant_by(target)) is None:
            raise Refused("generation_gone")
        return self.served(row)

    def found(self, tenant: str, name: str, generation: int | None) -> list[Row]:
        """The generations that an adapter's name, perhaps with a number, means to a tenant."""
        rows = self.meant(tenant, name)
        if generation is not None and rows:
            chosen = [row for row in rows if row.generation == generation]
            if not chosen and 1 <= generation < rows[0].generation:
                raise Refused("generation_gone")
            rows = chosen
        if not rows:
            raise Refused("model_not_found")
        return rows

    def served(self, row: Row) -> Row:
        if row.status == "failed":
            raise Refused("adapter_failed")
        if row.status != "ready" or row.digest in self.unpacked:
            raise Refused("adapter_not_ready")
        return row

    def alias(self, tenant: str, name: str) -> Alias | None:
        """The alias that a name means to a tenant: its own, else, if it has no adapter of that
        name, the shared one."""
        if own := self.aliases.get((tenant, name)):
            return own
        return None if self.visible(tenant, name) else self.aliases.get((SHARED, name))

    def meant_by(self, target: Target) -> Row | None:
        rows = self.visible(target.owner, target.name)
        if not target.follows:
            rows = [row for row in rows if row.generation == target.generation]
        return best(rows) if rows else None

    def sees_blob(self, tenant: str, digest: str) -> bool:
        uses = any(
            row.tenant == tenant and not row.refused and digest in row.files for row in self.rows
        )
        return uses or (tenant, digest) in self.granted

    def needed_blobs(self) -> set[str]:
        rows = {file for row in self.rows if not row.refused for file in row.files}
        return rows | {digest for _, digest in self.granted} | set(+self.held)

    def pins(self) -> set[str]:
        """What the engine has to keep."""
        return {row.digest for row in self.rows if row.pinned and not self.has_ended(row)}

    def pins_that_end(self) -> set[str]:
        """What it may keep until the sweep."""
        return {row.digest for row in self.rows if row.pinned and self.has_ended(row)}

    def has_ended(self, row: Row) -> bool:
        return row.status == "deleting" or self.is_over(row)

    def waiting_bytes(self, tenant: str) -> int:
        """Files of a tenant beside its adapters, as its quota counts them."""
        used = {
            file
            for row in self.rows
            if row.tenant == tenant and row.status in ("validating", "ready")
            for file in row.files
        }
        uploads = [len(data) for who, data, _ in self.uploads.values() if who == tenant]
        granted = self.granted.items()
        return sum(uploads) + sum(n for (who, d), n in granted if who == tenant and d not in used)

    # What happens.

    def create(
        self,
        tenant: str,
        name: str,
        files: tuple[bytes, bytes],
        expected: int | None,
        expires: int | None = None,
    ) -> tuple[Row, bool]:
        """The row, and whether its verdict is awaited now."""
        self.expire()
        row, fresh = self._create(tenant, name, files, expected)
        row.expires = expires or row.expires
        return row, fresh

    def _create(
        self, tenant: str, name: str, files: tuple[bytes, bytes], expected: int | None
    ) -> tuple[Row, bool]:
        if (tenant, name) in self.aliases:
            raise Refused("name_reserved")
        rows = self.visible(tenant, name)
        holder = next((row for row in rows if row.status in ("validating", "ready")), None)
        if holder and (holder.config, holder.weights) == files:
            return holder, False
        if rows and rows[0].status == "failed" and (rows[0].config, rows[0].weights) == files:
            rows[0].status, rows[0].examined, rows[0].refused = "validating", True, False
            return rows[0], True
        current = holder.generation if holder else 0
        if expected != current and (holder or expected is not None):
            raise Refused("generation_conflict")
        for row in rows:
            if row.status == "failed":
                self.rows.remove(row)
        self.last[tenant, name] += 1
        row = Row(tenant, name, self.last[tenant, name], *files, examined=True)
        self.rows.append(row)
        return row, True

    def conclude(self, row: Row) -> None:
        """The verdict on a row is in."""
        row.examined = False
        if is_good(row.config):
            self.packed.add(row.digest)
        if row.status == "deleting":
            self.forget([row])
            return
        self.unpacked.discard(row.digest)
        if not is_good(row.config):
            row.status, row.refused = "failed", True
            return
        self.expire_name(row.tenant, row.name)
        if row.status == "deleting":
            self.forget([row])
            return
        row.status = "ready"
        for other in self.living(row.tenant, row.name):
            if other.generation < row.generation and other.pinned:
                other.pinned, row.pinned = False, True

    def delete(self, tenant: str, name: str, generation: int | None = None) -> None:
        """Every generation of a tenant's own name, or the one."""
        if generation is not None:
            self.found(tenant, name, generation)
        rows = self.visible(tenant, name)
        if generation is not None:
            rows = [row for row in rows if row.generation == generation]
        if not rows:
            raise Refused("model_not_found")
        if any(row.pinned for row in rows):
            raise Refused("adapter_pinned")
        if any(self.is_held(row) for row in rows):
            raise Refused("adapter_aliased")
        self.expire_name(tenant, name)
        for row in rows:
            row.status = "deleting"
        self.forget(rows)

    def set_ttl(self, tenant: str, name: str, generation: int | None, expires: int | None) -> Row:
        meant = best(self.found(tenant, name, generation))
        if meant.tenant != tenant:
            raise Refused("model_not_found")
        self.expire_name(tenant, name)
        meant.expires = expires
        return meant

    def time_goes_by(self, tenant: str) -> None:
        for row in self.rows:
            if row.tenant == tenant and row.expires is not None:
                row.expires = OVER

    def expire(self) -> None:
        """What is over is deleted, wherever it is."""
        for tenant, name in {(row.tenant, row.name) for row in self.rows}:
            self.expire_name(tenant, name)

    def expire_name(self, tenant: str, name: str) -> None:
        for row in [row for row in self.living(tenant, name) if self.is_over(row)]:
            row.status = "deleting"

    def set_alias(
        self, tenant: str, name: str, meant: list[tuple[str, int | None, int]], expected: int | None
    ) -> Alias:
        """``meant`` are names, generations and weights."""
        targets: dict[Target, int] = {}
        for model, generation, weight in meant:
            target = self.target(tenant, name, model, generation)
            if target in targets:
                raise Refused(InvalidRequest.code)
            targets[target] = weight
        weighted = tuple(replace(target, weight=n) for target, n in targets.items())
        self.expire()
        now = self.aliases.get((tenant, name))
        if now and now.targets == weighted:
            return now
        if expected not in (None, now.revision if now else 0):
            raise Refused("revision_conflict")
        if self.visible(tenant, name):
            raise Refused("name_reserved")
        self.revisions[tenant, name] += 1
        alias = Alias(tenant, name, self.revisions[tenant, name], weighted)
        self.aliases[tenant, name] = alias
        return alias

    def target(self, tenant: str, alias: str, model: str, generation: int | None) -> Target:
        if model == BASE_NAME:
            return Target()
        if generation is None and (model == alias or self.alias(tenant, model)):
            raise Refused(InvalidRequest.code)
        row = self.served(best(self.found(tenant, model, generation)))
        if generation is None:
            return Target(owner=row.tenant, name=model)
        return Target(owner=row.tenant, name=model, generation=generation, digest=row.digest)

    def remove_alias(self, tenant: str, name: str) -> None:
        if (tenant, name) not in self.aliases:
            raise Refused("model_not_found")
        del self.aliases[tenant, name]
        self.revisions[tenant, name] += 1

    def pin(self, tenant: str, name: str, pinned: bool) -> Row:
        rows = self.visible(tenant, name)
        if not rows:
            raise Refused("model_not_found")
        row = best(rows)
        if row.status != "ready":
            raise Refused("adapter_not_ready")
        self.expire_name(tenant, name)
        row.pinned = pinned
        return row

    def forget(self, rows: Iterable[Row]) -> None:
        """End those of them that are being deleted and that nobody uses."""
        for row in list(rows):
            in_use = self.references[row.digest] or row.examined
            if row.status == "deleting" and not in_use:
                self.rows.remove(row)
        self.packed &= {row.digest for row in self.rows}


def best(rows: list[Row]) -> Row:
    return next((row for row in rows if row.status == "ready"), rows[0])


def facts(row: Any) -> tuple[Any, ...]:
    """What the registry's rows and the model's have in common."""
    life = None if row.expires is None else row.expires <= OVER
    return row.tenant, row.name, row.generation, row.digest, row.status, row.pinned, str(life)
