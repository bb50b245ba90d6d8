"""The engine's pins follow the catalog's, also when changes overtake one another."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from loramux.errors import Conflict, Overloaded
from loramux.front.catalog import Catalog
from loramux.front.pins import Pins


class Bench:
    """A catalog whose ready and pinned digests are ``wanted``, and an engine that takes a turn of
    the loop for each answer."""

    def __init__(self, *wanted: str) -> None:
        self.wanted, self.held = set(wanted), set[str]()
        self.full: set[str] = set()
        self.up = True
        self.pins = Pins(
            cast(Catalog, SimpleNamespace(rows=self.rows, is_over=lambda _: False)), self.ask
        )

    def rows(self) -> list[Any]:
        return [SimpleNamespace(digest=d, pinned=True, status="ready") for d in self.wanted]

    async def ask(self, kind: str, digest: str) -> None:
        await asyncio.sleep(0.001)
        if not self.up:
            raise Overloaded("no engine")
        if digest in self.full:
            raise Conflict("no room", code="pool_full")
        (self.held.add if kind == "pin" else self.held.discard)(digest)


def test_a_pin_that_moves_while_the_engine_is_being_told() -> None:
    async def main() -> None:
        bench = Bench("one")
        first = asyncio.create_task(bench.pins.tell())
        await asyncio.sleep(0)
        bench.wanted = {"two"}
        await asyncio.gather(first, bench.pins.tell())
        assert bench.held == {"two"}

    asyncio.run(main())


def test_what_is_refused_keeps_nobody_else_out_and_is_tried_again() -> None:
    async def main() -> None:
        bench = Bench("a", "b", "c")
        bench.full = {"b"}
        assert set(await bench.pins.tell()) == {"b"}
        assert bench.held == {"a", "c"}
        bench.full, bench.wanted = set(), {"b", "c"}
        assert await bench.pins.tell() == {}
        assert bench.held == {"b", "c"}

    asyncio.run(main())


def test_a_new_engine_is_told_everything() -> None:
    async def main() -> None:
        bench = Bench("a")
        bench.up = False
        assert await bench.pins.tell() == {}
        bench.up = True
        await bench.pins.tell()
        bench.held.clear()
        await bench.pins.tell()
        assert bench.held == set(), "it was told"
        bench.pins.forget()
        await bench.pins.tell()
        assert bench.held == {"a"}

    asyncio.run(main())
