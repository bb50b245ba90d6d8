"""Generations whose time is over while there are others of the name, before any sweep."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.front.played import House
from tests.front.visible_model import sha

from loramux.errors import NotFound, Overloaded

FIRST, SECOND = b"first", b"second"


async def upload(house: House, name: str, weights: bytes, *, config: bytes = b"{}") -> None:
    """The next generation, which lives for an hour."""
    writer = await house.service.begin()
    try:
        await writer.write(weights)
        digest = await writer.commit()
        expected = house.service.own(name, tenant="")
        await house.service.create(
            name,
            config,
            digest,
            ttl_s=3600,
            expected_generation=expected.generation if expected else 0,
        )
    finally:
        await writer.abort()
    await house.settle()


async def end(house: House, generation: int) -> None:
    """The hour is over for one of the cats."""
    with house.service.shelf.registry.database.transaction() as db:
        db.execute("UPDATE adapters SET expires = 1 WHERE generation = ?", (generation,))
    await house.service.shelf.refresh("", "cat")


def test_one_that_failed_needs_no_files(tmp_path: Path) -> None:
    """Also when it is over and the sweep has yet to come: files of its bytes that nobody wants are
    removed, as ever."""

    async def main() -> None:
        house = House(tmp_path)
        await house.start()
        bad = b'{"bad":1}'
        await upload(house, "cat", FIRST, config=bad)
        await end(house, 1)
        await upload(house, "dog", SECOND)
        (row,) = house.service.shelf.registry.list("cat")
        assert row.status == "deleting"
        await upload(house, "owl", FIRST, config=bad)
        assert set(house.service._store.digests()) == {sha(b"{}"), sha(SECOND)}
        await house.stop()

    asyncio.run(main())


@pytest.mark.parametrize("swept_by", ["nobody", "an upload"])
def test_a_new_alias_does_not_bring_it_back(tmp_path: Path, swept_by: str) -> None:
    async def main() -> None:
        house = House(tmp_path)
        await house.start()
        service = house.service
        await upload(house, "cat", FIRST)
        await upload(house, "cat", SECOND)
        await end(house, 2)
        if swept_by == "an upload":
            await upload(house, "dog", FIRST)
        await service.aliases.set("pet", [("cat", 1)])
        (row,) = [row for row in service.shelf.registry.list("cat") if row.generation == 2]
        assert row.status == "deleting"
        assert service.resolve("cat").generation == 1
        assert service.resolve("pet").generation == 1
        with pytest.raises(NotFound):
            service.resolve("cat@2")
        await house.stop()

    asyncio.run(main())


def test_a_pin_does_not_move_to_it(tmp_path: Path) -> None:
    """Its verdict comes when its time is over."""

    async def main() -> None:
        house = House(tmp_path)
        await house.start()
        service = house.service
        await upload(house, "cat", FIRST)
        await service.set_pinned("cat", True)
        pinned = service.resolve("cat").label
        house.ingest.holding = True
        await upload(house, "cat", SECOND)
        await end(house, 2)
        house.ingest.release()
        await house.settle()
        assert service.show("cat").generation == 1
        assert service.show("cat").pinned and house.engine.pins == {pinned}
        assert [row.generation for row in service.shelf.registry.list("cat")] == [1]
        assert sorted(service._store.digests()) == sorted([sha(b"{}"), sha(FIRST)])
        await house.stop()

    asyncio.run(main())


def test_a_server_that_has_just_started_does_not_say_that_nothing_is_there(tmp_path: Path) -> None:
    """A client that was told of its adapter asks again after a restart: 503, never 404."""

    async def main() -> None:
        house = House(tmp_path / "data")
        for ask in (house.service.show, house.service.resolve, house.service.versions):
            with pytest.raises(Overloaded):
                ask("cat@1")
        await house.start()
        for ask in (house.service.show, house.service.resolve, house.service.versions):
            with pytest.raises(NotFound):
                ask("cat@1")
        await house.stop()

    asyncio.run(main())
