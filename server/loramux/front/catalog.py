"""What every adapter name means now: the registry's rows in memory, for the hot path."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loramux.adapters.registry import MIN_PREFIX, AdapterRow
from loramux.errors import Conflict, GenerationGone, NotFound
from loramux.front.observations import Snapshot
from loramux.request import AdapterRef, Adapters

Status = Literal["receiving", "validating", "ready", "failed", "deleting", "incompatible"]

_MODEL = re.compile(r"([^@]+)(?:@(?:(\d{1,18})|sha256:([0-9a-f]{1,64})))?")


class AdapterView(msgspec.Struct, kw_only=True):
    """An adapter as HTTP shows it. ``report`` is what the import found; ``error`` why it failed
    (``{"code", "message", "problems"}``). ``created`` is Unix seconds."""

    id: str
    object: str = "adapter"
    name: str
    digest: str
    generation: int
    status: Status
    residency: Literal["pool", "disk"] = "disk"
    pinned: bool = False
    created: int = 0
    rank: int = 0
    num_bytes: int = 0
    num_frames: int = 0
    report: dict[str, Any] = {}
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Served:
    """What a request's ``model`` means now. The base has no adapters and generation 0, and so has
    a list of adapters no generation of its own."""

    adapters: Adapters
    name: str
    generation: int = 0
    combines: bool = True
    """Whether it may be worn beside others: not when it changes what a module reads."""

    @property
    def label(self) -> str:
        """The digests that answer, with their scales where those are not 1; "base" for none."""
        entries = [
            ref.digest if ref.scale == 1 else f"{ref.digest};scale={ref.scale:g}"
            for ref in self.adapters
        ]
        return ", ".join(entries) or "base"


class Catalog:
    """Names to versions. Reads memory only; whoever changes the registry calls ``put``."""

    def __init__(self, base_name: str, snapshot: Snapshot) -> None:
        self.base_name = base_name
        self._snapshot = snapshot
        self._versions: dict[str, list[AdapterRow]] = {}
        self._serving: Counter[str] = Counter()
        self._deleting: dict[int, AdapterRow] = {}
        self.broken: dict[str, AdapterView] = {}
        """Adapters of the command line that could not even be registered."""
        self.unpacked: set[str] = set()
        """Digests whose packed file went missing and is being made again."""

    def put(self, name: str, rows: list[AdapterRow]) -> None:
        """The registry's rows of a name now, newest generation first."""
        for row in self._versions.pop(name, ()):
            self._deleting.pop(row.id, None)
            if row.status == "ready":
                self._serving[row.digest] -= 1
                if not self._serving[row.digest]:
                    del self._serving[row.digest]
        for row in rows:
            if row.status == "deleting":
                self._deleting[row.id] = row
            if row.status == "ready":
                self._serving[row.digest] += 1
        if rows:
            self._versions[name] = rows

    def rows(self) -> Iterator[AdapterRow]:
        """Every generation of every name."""
        for rows in self._versions.values():
            yield from rows

    def row(self, row: AdapterRow) -> AdapterRow:
        """The newest state of a row; itself when it is gone."""
        return next((r for r in self._versions.get(row.name, ()) if r.id == row.id), row)

    def resolve(self, model: str) -> Served:
        """See AdapterService.resolve."""
        if model == self.base_name:
            return Served((), model)
        view = self.show(model)
        if view.status == "ready":
            combines = "input_gain" not in view.report.get("vectors", ())
            return Served((AdapterRef(view.digest),), view.name, view.generation, combines)
        name = repr(view.name)
        if view.status == "failed":
            why = view.error["message"] if view.error else "it failed validation"
            message, code = f"the adapter {name} cannot be served: {why}", "adapter_failed"
        elif view.status == "incompatible":
            message = f"the adapter {name} was validated against another base model"
            code = "adapter_incompatible"
        else:
            raise Conflict(
                f"the adapter {name} is still being validated",
                param="model",
                code="adapter_not_ready",
                retry_after_s=1,
            )
        raise Conflict(message, param="model", code=code)

    def show(self, model: str) -> AdapterView:
        """What a name (with or without a version) means. Raises NotFound, GenerationGone."""
        match = _MODEL.fullmatch(model)
        name, generation, prefix = match.groups() if match else (model, None, None)
        rows = [row for row in self._versions.get(name, ()) if row.status != "deleting"]
        if not rows and match and match[0] == name and name in self.broken:
            return self.broken[name]
        found = rows
        if generation is not None:
            found = [row for row in rows if row.generation == int(generation)]
            if rows and not found and 1 <= int(generation) < rows[0].generation:
                raise GenerationGone(
                    f"generation {generation} of {name!r} no longer exists", param="model"
                )
        elif prefix is not None:
            found = [row for row in rows if row.digest.startswith(prefix)]
            if found and (len(prefix) < MIN_PREFIX or len({row.digest for row in found}) > 1):
                raise NotFound(f"{model!r} is too short to name one version", param="model")
        if not found:
            raise NotFound(f"the model {model!r} does not exist", param="model")
        return self.view(_best(found))

    def list(self) -> list[AdapterView]:
        """What every bare name means, by name; those being deleted until they are gone."""
        views = dict(self.broken)
        for name, rows in self._versions.items():
            visible = [row for row in rows if row.status != "deleting"]
            views[name] = self.view(_best(visible or rows))
        return [views[name] for name in sorted(views)]

    def view(self, row: AdapterRow) -> AdapterView:
        """A row as HTTP shows it."""
        status: Status = row.status
        if status == "ready" and row.digest in self.unpacked:
            status = "validating"
        return AdapterView(
            id=f"{row.name}@{row.generation}",
            name=row.name,
            digest=row.digest,
            generation=row.generation,
            status=status,
            residency="pool" if row.digest in self._snapshot.resident else "disk",
            pinned=row.pinned,
            created=int(row.created),
            rank=row.report.get("rank", 0),
            num_bytes=row.report.get("num_bytes", 0),
            num_frames=row.report.get("num_frames", 0),
            report=row.report,
            error=row.error,
        )

    def holder(self, name: str) -> int:
        """The generation that an ``expected_generation`` has to name; 0 when the name is free."""
        rows = self._versions.get(name, ())
        return next((r.generation for r in rows if r.status in ("validating", "ready")), 0)

    def serves(self, digest: str) -> bool:
        """Whether any name still serves this version."""
        return digest in self._serving and digest not in self.unpacked

    def deleting(self) -> tuple[AdapterRow, ...]:
        """Every generation that is to go."""
        return tuple(self._deleting.values())


def _best(rows: list[AdapterRow]) -> AdapterRow:
    """Of rows newest first: the newest ready one, else the newest (as Registry.get)."""
    return next((row for row in rows if row.status == "ready"), rows[0])
