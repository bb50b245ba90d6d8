"""The life of an alias: set, swapped, looked at, removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from loramux.adapters.aliases import AliasRow, Target
from loramux.config import ADAPTER_NAME
from loramux.errors import Conflict, InvalidRequest, NotFound, Overloaded, RequestError
from loramux.front.catalog import SHARED, Status, model_of, split
from loramux.front.shelf import Shelf

MAX_TARGETS = 16
MAX_WEIGHT = 1_000_000


class TargetView(msgspec.Struct, kw_only=True):
    """One share of an alias. ``model`` is ``name@generation``, or ``name`` when it ``follows`` the
    name to its newest generation. ``digest`` is what answers now: null for the base, and for what
    has gone."""

    model: str
    weight: int
    follows: bool
    digest: str | None
    status: Status | Literal["gone"]


class AliasView(msgspec.Struct, kw_only=True):
    """An alias as HTTP shows it. ``changed`` is Unix seconds."""

    id: str
    object: str = "alias"
    revision: int
    targets: list[TargetView]
    changed: int


class AliasService:
    """Every alias this server knows; names are a tenant's own as adapters' are."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._catalog = shelf.catalog

    def list(self, *, tenant: str = SHARED) -> list[AliasView]:
        """What every alias that the tenant sees stands for, by name."""
        return [self._view(row) for row in self._catalog.aliases(tenant=tenant)]

    def show(self, name: str, *, tenant: str = SHARED) -> AliasView:
        """One alias; raises NotFound."""
        if (row := self._catalog.alias(name, tenant=tenant)) is None:
            raise NotFound(f"the alias {name!r} does not exist", param="alias")
        return self._view(row)

    def owner(self, name: str, *, tenant: str) -> str:
        """Whose alias the name means to the tenant: its own, also when it means nothing."""
        row = self._catalog.alias(name, tenant=tenant)
        return tenant if row is None else row.tenant

    async def set(
        self,
        name: str,
        targets: Sequence[tuple[str, int]],
        *,
        expected_revision: int | None = None,
        tenant: str = SHARED,
        params: Sequence[str] | None = None,
    ) -> tuple[AliasView, bool]:
        """Point an alias at (model, weight) pairs, all at once; the view, and whether it is new.

        A target is what its ``model`` means now, and stays that: ``name@…`` is one generation,
        whatever becomes of the name; a bare ``name`` is the adapter of that name and follows it to
        its newest generation. ``params`` say which field each came in. Raises InvalidRequest,
        Overloaded before an engine was ready once, what ``resolve`` raises for a target, and as
        ``Aliases.set``.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"alias: must match {ADAPTER_NAME.pattern}", param="alias")
        if name == self._catalog.base_name:
            raise Conflict("the name is the base model's", param="alias", code="name_reserved")
        if name in self._catalog.broken and tenant == SHARED:
            raise Conflict("an adapter has this name", param="alias", code="name_reserved")
        if not self._shelf.filled:
            raise Overloaded("no engine has been ready yet", code="engine_starting")
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise InvalidRequest(f"targets: 1 to {MAX_TARGETS} of them", param="targets")
        found: dict[Target, int] = {}
        for index, (model, weight) in enumerate(targets):
            param = params[index] if params else f"targets[{index}].model"
            target = self._target(name, model, param, tenant)
            if target in found:
                raise InvalidRequest(f"{param}: the same adapter came before", param=param)
            found[target] = weight
        meant = [msgspec.structs.replace(target, weight=found[target]) for target in found]

        await self._shelf.expire()  # what is over has no name, and this alias does not hold it
        row, before = await self._shelf.change_alias(
            tenant,
            name,
            lambda: self._shelf.aliases.set(
                name, meant, expected_revision=expected_revision, tenant=tenant
            ),
        )
        return self._view(row), not before

    def _target(self, alias: str, model: str, param: str, tenant: str) -> Target:
        """What ``model`` means now, with weight 1."""
        if model == self._catalog.base_name:
            return Target()
        if model == alias or self._catalog.alias(model, tenant=tenant) is not None:
            raise InvalidRequest(
                f"{param}: an alias; name the adapters that it stands for", param=param
            )
        try:
            served = self._catalog.resolve(model, tenant=tenant)
        except RequestError as error:
            error.param = param
            raise
        owner = self._catalog.owner(model, tenant=tenant)
        if split(model)[0] == model:
            return Target(owner=owner, name=model)
        (ref,) = served.adapters
        return Target(
            owner=owner, name=served.name, generation=served.generation, digest=ref.digest
        )

    async def delete(self, name: str, *, tenant: str = SHARED) -> AliasView:
        """The alias means nothing from now on; what it stood for stays. Raises NotFound."""
        if not self._shelf.filled:
            raise Overloaded("no engine has been ready yet", code="engine_starting")
        row = await self._shelf.change_alias(
            tenant, name, lambda: self._shelf.aliases.remove(name, tenant=tenant)
        )
        return self._view(row)

    def _view(self, row: AliasRow) -> AliasView:
        return AliasView(
            id=row.name,
            revision=row.revision,
            targets=[self._target_view(target) for target in row.targets],
            changed=int(row.changed),
        )

    def _target_view(self, target: Target) -> TargetView:
        if not target.name:
            model, digest, status = self._catalog.base_name, None, "ready"
        else:
            view, model = self._catalog.target(target), model_of(target)
            digest = view.digest if view else None
            status = view.status if view else "gone"
        return TargetView(
            model=model,
            weight=target.weight,
            follows=target.follows,
            digest=digest,
            status=status,  # type: ignore[arg-type]
        )
