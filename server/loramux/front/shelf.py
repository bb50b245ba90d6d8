"""The registry on its thread, and the catalog in memory that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from loramux.adapters.aliases import Aliases
from loramux.adapters.registry import AdapterRow, Registry, Rows
from loramux.front.background import Background
from loramux.front.catalog import Catalog

T = TypeVar("T")


class Shelf:
    """Whoever changes the registry does it through ``change``: then the catalog has it too."""

    def __init__(self, registry: Registry, catalog: Catalog, background: Background) -> None:
        self.registry, self.catalog = registry, catalog
        self.aliases = Aliases(registry.database)
        self.filled = False
        """Whether the catalog has what the registry had when the server started."""
        self._background = background

    async def change(self, tenant: str, name: str, function: Callable[[], T]) -> T:
        """Run on the registry's thread; the name means what the registry says when this returns."""
        result = await self._background.on_disk(function)
        await self.refresh(tenant, name)
        return result

    async def expire(self) -> Rows:
        """Mark every generation whose time is over; all that are being deleted."""
        rows = await self._background.on_disk(self.registry.expire)
        for tenant, name in {(row.tenant, row.name) for row in rows}:
            await self.refresh(tenant, name)
        return rows

    async def refresh(self, tenant: str, name: str) -> None:
        """Bring the catalog up to the registry, for one name."""
        rows = await self._background.on_disk(lambda: self.registry.list(name, tenant=tenant))
        self.catalog.put(name, rows, tenant=tenant)

    async def change_alias(self, tenant: str, name: str, function: Callable[[], T]) -> T:
        """As ``change``, for an alias."""
        result = await self._background.on_disk(function)
        row = await self._background.on_disk(lambda: self.aliases.get(name, tenant=tenant))
        self.catalog.put_alias(name, row, tenant=tenant)
        return result

    async def refresh_all(self) -> None:
        """Bring all of the catalog up to the registry: a base is known now, or another."""
        for alias in await self._background.on_disk(self.aliases.every):
            self.catalog.put_alias(alias.name, alias, tenant=alias.tenant)
        by_name: dict[tuple[str, str], list[AdapterRow]] = {}
        for row in await self._background.on_disk(self.registry.every):
            by_name.setdefault((row.tenant, row.name), []).append(row)
        for (tenant, name), versions in by_name.items():
            self.catalog.put(name, versions, tenant=tenant)
        self.filled = True
