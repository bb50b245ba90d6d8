"""What a server's tenants should see of their adapters, and what it should keep for them: the rules
in memory, without files, threads and processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from loramux.adapters.blobs import adapter_digest

SHARED = ""
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
    """One generation of a name. ``examined``: its verdict is awaited."""

    tenant: str
    name: str
    generation: int
    config: bytes
    weights: bytes
    status: Status = "validating"
    pinned: bool = False
    examined: bool = False

    @property
    def digest(self) -> str:
        return adapter_digest(*self.files)

    @property
    def files(self) -> tuple[str, str]:
        return sha(self.config), sha(self.weights)


@dataclass
class Model:
    """``granted`` maps (tenant, digest) to bytes; ``uploads`` an id to (tenant, file, offset);
    ``held`` counts files that an upload under way has brought; ``references`` requests by version;
    ``packed`` are the versions with a packed file, ``unpacked`` those that lost it."""

    rows: list[Row] = field(default_factory=list)
    last: Counter[tuple[str, str]] = field(default_factory=Counter)
    granted: dict[tuple[str, str], int] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bytes, int]] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    references: Counter[str] = field(default_factory=Counter)
    packed: set[str] = field(default_factory=set)
    unpacked: set[str] = field(default_factory=set)

    # What is there.

    def of(self, tenant: str, name: str) -> list[Row]:
        """Newest generation first, those being deleted as well."""
        rows = [row for row in self.rows if (row.tenant, row.name) == (tenant, name)]
        return sorted(rows, key=lambda row: -row.generation)

    def visible(self, tenant: str, name: str) -> list[Row]:
        return [row for row in self.of(tenant, name) if row.status != "deleting"]

    def meant(self, tenant: str, name: str) -> list[Row]:
        """The visible generations of what the name means to a tenant: its own, else the shared."""
        return self.visible(tenant, name) or self.visible(SHARED, name)

    def serves(self, digest: str) -> bool:
        ready = any(row.digest == digest and row.status == "ready" for row in self.rows)
        return ready and digest not in self.unpacked

    def resolve(self, tenant: str, name: str, generation: int | None = None) -> Row:
        rows = self.meant(tenant, name)
        if generation is not None and rows:
            found = [row for row in rows if row.generation == generation]
            if not found and 1 <= generation < rows[0].generation:
                raise Refused("generation_gone")
            rows = found
        if not rows:
            raise Refused("model_not_found")
        row = best(rows)
        if row.status == "failed":
            raise Refused("adapter_failed")
        if row.status != "ready" or row.digest in self.unpacked:
            raise Refused("adapter_not_ready")
        return row

    def sees_blob(self, tenant: str, digest: str) -> bool:
        uses = any(
            row.tenant == tenant and row.status != "failed" and digest in row.files
            for row in self.rows
        )
        return uses or (tenant, digest) in self.granted

    def needed_blobs(self) -> set[str]:
        rows = {file for row in self.rows if row.status != "failed" for file in row.files}
        return rows | {digest for _, digest in self.granted} | set(+self.held)

    def pins(self) -> set[str]:
        return {row.digest for row in self.rows if row.pinned}

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
        self, tenant: str, name: str, files: tuple[bytes, bytes], expected: int | None
    ) -> tuple[Row, bool]:
        """The row, and whether its verdict is awaited now."""
        rows = self.visible(tenant, name)
        holder = next((row for row in rows if row.status in ("validating", "ready")), None)
        if holder and (holder.config, holder.weights) == files:
            return holder, False
        if rows and rows[0].status == "failed" and (rows[0].config, rows[0].weights) == files:
            rows[0].status, rows[0].examined = "validating", True
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
            self.forget()
            return
        self.unpacked.discard(row.digest)
        row.status = "ready" if is_good(row.config) else "failed"
        if row.status == "ready":
            for other in self.of(row.tenant, row.name):
                if other.generation < row.generation and other.pinned:
                    other.pinned, row.pinned = False, True

    def delete(self, tenant: str, name: str) -> None:
        rows = self.visible(tenant, name)
        if not rows:
            raise Refused("model_not_found")
        if any(row.pinned for row in rows):
            raise Refused("adapter_pinned")
        for row in rows:
            row.status = "deleting"
        self.forget()

    def pin(self, tenant: str, name: str, pinned: bool) -> Row:
        rows = self.visible(tenant, name)
        if not rows:
            raise Refused("model_not_found")
        row = best(rows)
        if row.status != "ready":
            raise Refused("adapter_not_ready")
        row.pinned = pinned
        return row

    def forget(self) -> None:
        """End what is being deleted and nobody uses."""
        for row in list(self.rows):
            in_use = self.references[row.digest] or row.examined
            if row.status == "deleting" and not in_use:
                self.rows.remove(row)
        self.packed &= {row.digest for row in self.rows}


def best(rows: list[Row]) -> Row:
    return next((row for row in rows if row.status == "ready"), rows[0])


def facts(row: Any) -> tuple[Any, ...]:
    """What the registry's rows and the model's have in common."""
    return row.tenant, row.name, row.generation, row.digest, row.status, row.pinned
