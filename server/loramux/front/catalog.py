"""What every adapter name means now: the registry's rows in memory, for the hot path.

Names are a tenant's own. What tenant "" has (the command line's adapters, and all without keys) is
shared: every tenant sees it under every name that is not the tenant's own. So it is with aliases,
which stand for adapters wherever a request names a model.

Requests name adapters for the target model. Those for the draft and the small model come along as
companions: an adapter's profile names them, and they are looked up where that adapter is at home,
so that what it means depends on nobody who asks.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from loramux.adapters.aliases import AliasRow, Target
from loramux.adapters.registry import MIN_PREFIX, AdapterRow, Rows, best, holders
from loramux.errors import Conflict, GenerationGone, InvalidRequest, NotFound, NumericalError
from loramux.front.faults import FLAGGED_FROM
from loramux.front.observations import Snapshot
from loramux.front.shares import choose
from loramux.request import MODEL_IDS, AdapterRef, Adapters, Role

Status = Literal["receiving", "validating", "ready", "failed", "deleting", "incompatible"]

SHARED = ""
"""The tenant whose adapters everybody sees."""

_MODEL = re.compile(r"([^@]+)(?:@(?:(\d{1,18})|sha256:([0-9a-f]{1,64})))?")


class Companion(msgspec.Struct, kw_only=True):
    """An adapter for another model that goes with one for the target. Only a ready one has a
    ``digest`` and is used; ``other_base``: the name's adapter is for yet another model."""

    name: str
    status: Status | Literal["missing", "other_base"]
    digest: str | None = None


class AdapterView(msgspec.Struct, kw_only=True):
    """An adapter as HTTP shows it. ``report`` is what the import found; ``error`` why it failed
    (``{"code", "message", "problems"}``). ``created`` and ``expires_at`` are Unix seconds.
    ``profile_digest`` is "" for an adapter without a profile; ``profile`` itself is there when one
    adapter is asked for. ``heads_digest`` is "" for one without Medusa heads of its own; what they
    are stands in the report. ``base`` is the model it is for, ``companions`` are those its profile
    names, by the model that each of them should be for. ``faults``: requests with it alone that
    broke, by error code; ``flagged``: too many of them for an accident."""

    id: str
    object: str = "adapter"
    name: str
    digest: str
    generation: int
    base: Role = "target"
    status: Status
    residency: Literal["pool", "disk"] = "disk"
    pinned: bool = False
    created: int = 0
    expires_at: int | None = None
    rank: int = 0
    num_bytes: int = 0
    num_frames: int = 0
    report: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    profile_digest: str = ""
    heads_digest: str = ""
    profile: dict[str, Any] | None = None
    faults: dict[str, int] = {}
    flagged: bool = False
    companions: dict[Role, Companion] = {}


@dataclass(frozen=True)
class Served:
    """What a request's ``model`` means now. The base has no adapters and generation 0, and so has
    a list of adapters no generation of its own. ``name`` is an alias's own when it was asked."""

    adapters: Adapters
    name: str
    generation: int = 0
    combines: bool = True
    """Whether it may be worn beside others: not when it changes what a module reads."""
    profiles: tuple[str, ...] = ()
    """The digest of each adapter's profile, "" for one that has none."""
    heads: tuple[str, ...] = ()
    """Likewise of its own Medusa heads."""
    versions: tuple[str, ...] = ()
    """``name@generation`` of each of the adapters."""
    companions: Mapping[int, Adapters] = field(default_factory=dict)
    """What other models wear meanwhile, by model id: of one adapter alone, those that are ready."""

    @property
    def label(self) -> str:
        """The digests that answer, with their scales where those are not 1; "base" for none."""
        entries = [
            ref.digest if ref.scale == 1 else f"{ref.digest};scale={ref.scale:g}"
            for ref in self.adapters
        ]
        return ", ".join(entries) or "base"

    @property
    def version(self) -> str:
        """``name@generation`` of what answers; "base" for none."""
        return ", ".join(self.versions) or "base"


class Catalog:
    """Names to versions. Reads memory only; whoever changes the registry calls ``put``."""

    def __init__(self, base_name: str, snapshot: Snapshot) -> None:
        self.base_name = base_name
        self._snapshot = snapshot
        self._versions: defaultdict[str, dict[str, Rows]] = defaultdict(dict)
        self._serving: Counter[str] = Counter()
        self._deleting: dict[int, AdapterRow] = {}
        self._aliases: defaultdict[str, dict[str, AliasRow]] = defaultdict(dict)
        self.broken: dict[str, AdapterView] = {}
        """Adapters of the command line that could not even be registered."""
        self.unpacked: set[str] = set()
        """Digests whose packed file went missing and is being made again."""

    def put(self, name: str, rows: list[AdapterRow], *, tenant: str = SHARED) -> None:
        """The registry's rows of a tenant's name now, newest generation first."""
        for row in self._versions[tenant].pop(name, ()):
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
            self._versions[tenant][name] = rows

    def put_alias(self, name: str, row: AliasRow | None, *, tenant: str = SHARED) -> None:
        """A tenant's alias now; None: it has none of that name."""
        if row is None:
            self._aliases[tenant].pop(name, None)
        else:
            self._aliases[tenant][name] = row

    def alias(self, name: str, *, tenant: str = SHARED) -> AliasRow | None:
        """The alias that a bare name means to the tenant; None when it means an adapter, or
        nothing."""
        if (own := self._aliases.get(tenant, {}).get(name)) or self._visible(tenant, name):
            return own
        return self._aliases.get(SHARED, {}).get(name)

    def aliases(self, *, tenant: str = SHARED) -> list[AliasRow]:
        """The aliases that the tenant sees, by name."""
        names = {name for who in (SHARED, tenant) for name in self._aliases.get(who, ())}
        found = (self.alias(name, tenant=tenant) for name in sorted(names))
        return [row for row in found if row is not None]

    def rows(self) -> Iterator[AdapterRow]:
        """Every generation of every name of every tenant."""
        for names in self._versions.values():
            for rows in names.values():
                yield from rows

    def row(self, row: AdapterRow) -> AdapterRow:
        """The newest state of a row; itself when it is gone."""
        return self.find(row) or row

    def find(self, row: AdapterRow) -> AdapterRow | None:
        """The newest state of a row; None when it is gone."""
        return next((r for r in self._of(row.tenant, row.name) if r.id == row.id), None)

    def resolve(self, model: str, *, tenant: str = SHARED, user: str | None = None) -> Served:
        """See AdapterService.resolve."""
        if model == self.base_name:
            return Served((), model)
        if (alias := self.alias(model, tenant=tenant)) is None:
            return _served(self.show(model, tenant=tenant))
        target = choose(alias.targets, tenant, model, user)
        if not target.name:
            return Served((), model)
        view = self.target(target)
        if view is None:
            message = f"the alias {model!r} stands for {model_of(target)!r}, which no longer exists"
            raise GenerationGone(message, param="model")
        return replace(_served(view), name=model)

    def target(self, target: Target) -> AdapterView | None:
        """What a target, which is not the base, is now; None when it has gone."""
        rows = [r for r in self._visible(target.owner, target.name) if r.base == "target"]
        if not target.follows:
            rows = [row for row in rows if row.generation == target.generation]
        return self.view(best(rows)) if rows else None

    def show(self, model: str, *, tenant: str = SHARED) -> AdapterView:
        """What a name (with or without a version) means. Raises NotFound, GenerationGone."""
        name, generation, prefix = split(model)
        rows = self._visible(self.owner(name, tenant=tenant), name)
        if not rows and model == name and name in self.broken:
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
        return self.view(best(found))

    def versions(self, name: str, *, tenant: str = SHARED) -> list[AdapterView]:
        """Every generation of a bare name, newest first; raises NotFound."""
        owner = self.owner(name, tenant=tenant)
        if not self._visible(owner, name):
            return [self.show(name, tenant=tenant)]
        return [self.view(row) for row in self._of(owner, name)]

    def list(self, *, tenant: str = SHARED) -> list[AdapterView]:
        """What every bare name means, by name; those being deleted until they are gone."""
        views = self.broken | self._bare(SHARED)
        if tenant != SHARED:
            own = self._bare(tenant)
            views |= {n: v for n, v in own.items() if v.status != "deleting" or n not in views}
        return [views[name] for name in sorted(views)]

    def _bare(self, tenant: str) -> dict[str, AdapterView]:
        names = self._versions.get(tenant, {})
        return {
            name: self.view(best(self._visible(tenant, name) or rows))
            for name, rows in names.items()
        }

    def labels(self) -> Mapping[str, Sequence[str]]:
        """Digest to the names that mean it now, for operators: ``tenant/name``, or ``name``."""
        labels: dict[str, tuple[str, ...]] = {}
        for tenant in sorted(self._versions):
            for name, view in sorted(self._bare(tenant).items()):
                label = f"{tenant}/{name}" if tenant else name
                labels[view.digest] = (*labels.get(view.digest, ()), label)
        return labels

    def owner(self, name: str, *, tenant: str) -> str:
        """Whose adapter a name means to this tenant: SHARED when only the shared one is there, else
        its own."""
        name = split(name)[0]
        shared = name in self.broken or self._visible(SHARED, name)
        return SHARED if shared and not self._visible(tenant, name) else tenant

    def own(self, name: str, *, tenant: str) -> AdapterView | None:
        """What the tenant's own bare name means; None when it has no such name."""
        rows = self._visible(tenant, name)
        return self.view(best(rows)) if rows else None

    def _visible(self, tenant: str, name: str) -> Rows:
        rows = [row for row in self._of(tenant, name) if row.status != "deleting"]
        return [row for row in rows if not self._is_over(row, rows)]

    def is_over(self, row: AdapterRow) -> bool:
        """Whether the time of a generation is over: it is as good as deleted."""
        rows = [r for r in self._of(row.tenant, row.name) if r.status != "deleting"]
        return self._is_over(row, rows)

    def _is_over(self, row: AdapterRow, rows: Rows) -> bool:
        if row.expires is None or row.expires > time.time():
            return False
        return not holders(row, rows, self._aliases.get(row.tenant, {}).values())

    def _of(self, tenant: str, name: str) -> Rows:
        return self._versions.get(tenant, {}).get(name, [])

    def view(self, row: AdapterRow) -> AdapterView:
        """A row as HTTP shows it."""
        status = self._status(row)
        # A tenant must not see that another one uses a file with the same bytes.
        wearers = self._snapshot.wearers.get(row.digest, ())
        here = row.tenant == SHARED or row.pinned or row.tenant in wearers
        broken = self._snapshot.adapter_faults.count(row.digest, row.tenant or None)
        return AdapterView(
            id=f"{row.name}@{row.generation}",
            name=row.name,
            digest=row.digest,
            generation=row.generation,
            base=row.base,
            status=status,
            residency="pool" if here and row.digest in self._snapshot.resident else "disk",
            pinned=row.pinned and status != "deleting",
            created=int(row.created),
            expires_at=row.expires,
            rank=row.report.get("rank", 0),
            num_bytes=row.report.get("num_bytes", 0),
            num_frames=row.report.get("num_frames", 0),
            report=row.report,
            error=row.error,
            profile_digest=row.profile_digest,
            heads_digest=row.heads_digest,
            faults={NumericalError.code: broken} if broken else {},
            flagged=broken >= FLAGGED_FROM,
            companions={
                role: self._companion(row, role, name)
                for role, name in row.report.get("companions", {}).items()
            },
        )

    def _status(self, row: AdapterRow) -> Status:
        if row.expires is not None and self.is_over(row):
            return "deleting"
        return "validating" if row.status == "ready" and row.digest in self.unpacked else row.status

    def _companion(self, row: AdapterRow, role: Role, name: str) -> Companion:
        """What the row's profile means by a name."""
        rows = self._visible(self.owner(name, tenant=row.tenant), name)
        if not rows:
            return Companion(name=name, status="missing")
        found = best(rows)
        if found.base != role:
            return Companion(name=name, status="other_base")
        status = self._status(found)
        return Companion(
            name=name, status=status, digest=found.digest if status == "ready" else None
        )

    def holder(self, name: str) -> int:
        """The generation of a shared name that an ``expected_generation`` has to name; 0 when the
        name is free."""
        rows = self._visible(SHARED, name)
        return next((r.generation for r in rows if r.status in ("validating", "ready")), 0)

    def serves(self, digest: str) -> bool:
        """Whether any name still serves this version."""
        return digest in self._serving and digest not in self.unpacked

    def deleting(self) -> tuple[AdapterRow, ...]:
        """Every generation that is to go."""
        return tuple(self._deleting.values())


def split(model: str) -> tuple[str, str | None, str | None]:
    """A name and the generation or the digest's beginning behind it, of which one may be there."""
    match = _MODEL.fullmatch(model)
    return (match[1], match[2], match[3]) if match else (model, None, None)


def model_of(target: Target) -> str:
    """A target, which is not the base, as one writes it."""
    return target.name if target.follows else f"{target.name}@{target.generation}"


def _served(view: AdapterView) -> Served:
    """A ready adapter for the target as a request gets it; raises InvalidRequest for one that is
    for another model, and Conflict for one that is not ready."""
    if view.base != "target":
        raise InvalidRequest(
            f"the adapter {view.name!r} is for the {view.base} model: ask for the adapter whose"
            " companion it is",
            param="model",
        )
    if view.status == "ready":
        return Served(
            (AdapterRef(view.digest),),
            view.name,
            view.generation,
            combines="input_gain" not in view.report.get("vectors", ()),
            profiles=(view.profile_digest,),
            heads=(view.heads_digest,),
            versions=(view.id,),
            companions={
                MODEL_IDS[role]: (AdapterRef(companion.digest),)
                for role, companion in view.companions.items()
                if companion.digest is not None
            },
        )
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
