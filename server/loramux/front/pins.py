"""What the engine is to keep in its pool, and what it has been told to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

from loramux.adapters.registry import AdapterRow
from loramux.errors import LoramuxError, Overloaded
from loramux.front.catalog import Catalog

log = logging.getLogger(__name__)

Ask = Callable[[Literal["pin", "unpin", "evict"], str], Awaitable[object]]


class Pins:
    """The engine follows the catalog: whoever has changed a pin calls ``tell``.

    Each call compares the two afresh and one is at it at a time, so that changes that overtake one
    another (a pin that moves to a new generation, an operator who takes it away) end well.
    """

    def __init__(self, catalog: Catalog, ask_engine: Ask) -> None:
        self._catalog = catalog
        self._ask_engine = ask_engine
        self._told: set[str] = set()
        self._lock = asyncio.Lock()

    def forget(self) -> None:
        """The engine is a new one, which was told nothing."""
        self._told.clear()

    async def tell(self) -> dict[str, LoramuxError]:
        """Unpin what has no pin any more, then pin what has one; what the engine refused, by
        digest. That is tried again the next time. Without an engine the next one is told."""
        refused = {}
        async with self._lock:
            wanted = {row.digest for row in self._catalog.rows() if self._keeps(row)}
            try:
                for digest in sorted(self._told - wanted):
                    await self._ask_engine("unpin", digest)
                    self._told.discard(digest)
                for digest in sorted(wanted - self._told):
                    try:
                        await self._ask_engine("pin", digest)
                        self._told.add(digest)
                    except Overloaded:
                        raise
                    except LoramuxError as error:
                        log.warning("could not pin adapter %s: %s", digest[:12], error.message)
                        refused[digest] = error
            except Overloaded:
                pass
        return refused

    def _keeps(self, row: AdapterRow) -> bool:
        return row.pinned and row.status == "ready" and not self._catalog.is_over(row)
