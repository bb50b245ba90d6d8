"""The registry on its thread, and the catalog in memory that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from loramux.adapters.registry import AdapterRow, Registry
from loramux.front.background import Background
from loramux.front.catalog import Catalog

T = TypeVar("T")


class Shelf:
    """Whoever changes the registry does it through ``change``: then the catalog has it too."""

    def __init__(self, registry: Registry, catalog: Catalog, background: Background) -> None:
        self.registry, self.catalog = registry, catalog
        self._background = background

    async def change(self, tenant: str, name: str, function: Callable[[], T]) -> T:
        """Run on the registry's thread; the name means what the registry says when this returns."""
        result = await self._background.on_disk(function)
        await self.refresh(tenant, name)
        return result

    async def refresh(self, tenant: str, name: str) -> None:
        """Bring the catalog up to the registry, for one name."""
        rows = await self._background.on_disk(lambda: self.registry.list(name, tenant=tenant))
        self.catalog.put(name, rows, tenant=tenant)

    async def refresh_all(self) -> None:
        """The same for every name: a base is known now, or all that was there before."""
        by_name: dict[tuple[str, str], list[AdapterRow]] = {}
        for row in await self._background.on_disk(self.registry.every):
            by_name.setdefault((row.tenant, row.name), []).append(row)
        for (tenant, name), versions in by_name.items():
            self.catalog.put(name, versions, tenant=tenant)
