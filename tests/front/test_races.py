"""Many at once: whatever the order, one wins, the mirror is the registry's, and no file is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.front.life_child import upload
from tests.front.played import House
from tests.front.visible_model import facts

from loramux.adapters.blobs import BlobStore
from loramux.errors import Conflict, LoramuxError, NotFound


def inside(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    """Run it in a house that is started, and whose books balance when all is over."""

    async def main() -> None:
        house = House(tmp_path / "data")
        await house.start()
        await body(house)
        await house.settle()
        balance(house, tmp_path / "data")
        await house.stop()

    asyncio.run(main())


def balance(house: House, data_dir: Path) -> None:
    shelf = house.service.shelf
    rows = shelf.registry.every()
    assert sorted(map(facts, shelf.catalog.rows())) == sorted(map(facts, rows))
    assert not [row for row in rows if row.status in ("validating", "deleting")]
    live = [row for row in rows if row.status == "ready"]
    files = {file for row in live for file in (row.config_digest, row.weights_digest)}
    assert set(BlobStore(data_dir).digests()) == files
    packed = {path.name[:64] for path in (data_dir / "packed").glob("*")}
    assert packed == {row.digest for row in live}
    assert house.engine.pins == {row.digest for row in live if row.pinned}
    assert house.engine.resident <= packed
    assert not house.service._references and not house.service.blobs.holds._counts


def test_the_same_a_hundred_times(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        examined = 0
        examine = house.ingest.examine

        async def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal examined
            examined += 1
            return await examine(*arguments, **options)

        house.ingest.examine = counted  # type: ignore[method-assign]
        await asyncio.gather(*(upload(house, "cat", b"same") for _ in range(100)))
        assert examined == 1
        assert [row.generation for row in house.service.shelf.registry.every()] == [1]

    inside(tmp_path, body)


@pytest.mark.parametrize("expected", [None, 0])
def test_of_many_that_take_a_name_one_has_it(tmp_path: Path, expected: int | None) -> None:
    async def body(house: House) -> None:
        uploads = (upload(house, "cat", b"%d" % i, expected) for i in range(50))
        ends = await asyncio.gather(*uploads, return_exceptions=True)
        assert Counter(map(type, ends)) == {type(None): 1, Conflict: 49}
        [winner] = [i for i, end in enumerate(ends) if end is None]
        replacing = (upload(house, "cat", b"%d" % (i + 50), 1) for i in range(50))
        ends = await asyncio.gather(*replacing, return_exceptions=True)
        assert Counter(map(type, ends)) == {type(None): 1, Conflict: 49}
        assert winner >= 0 and house.service.resolve("cat").generation == 2

    inside(tmp_path, body)


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(tmp_path: Path, seed: int) -> None:
    """Three hundred operations on two names, thirty of them at any time."""
    draw = random.Random(seed)
    done: Counter[str] = Counter()

    async def one(house: House, gate: asyncio.Semaphore) -> None:
        service, name = house.service, draw.choice(["cat", "dog"])
        what = draw.choice(["upload", "upload", "replace", "pin", "unpin", "delete", "use", "use"])
        weights, rest = b"%d" % draw.randrange(4), draw.random() / 100
        async with gate:
            await asyncio.sleep(rest)
            try:
                if what == "upload":
                    await upload(house, name, weights)
                elif what == "replace":
                    current = service.own(name, tenant="")
                    await upload(house, name, weights, current.generation if current else 0)
                elif what in ("pin", "unpin"):
                    await service.set_pinned(name, what == "pin")
                elif what == "delete":
                    await service.delete(name)
                else:
                    await use(house, name, rest)
                done[what] += 1
            except (Conflict, NotFound):
                done["refused"] += 1
            except AssertionError:  # deleted before its verdict
                done["deleted"] += 1

    async def use(house: House, name: str, seconds: float) -> None:
        digest = house.service.resolve(name).label
        house.service.retain(digest)
        house.engine.resident.add(digest)
        house.engine.leases[digest] += 1
        await asyncio.sleep(seconds)
        house.engine.leases[digest] -= 1
        house.service.release(digest)

    async def body(house: House) -> None:
        gate = asyncio.Semaphore(30)
        await asyncio.gather(*(one(house, gate) for _ in range(300)))
        assert len(done) >= 7 and min(done.values()) > 0, done
        for name in ("cat", "dog"):
            for work in (house.service.set_pinned(name, False), house.service.delete(name)):
                try:
                    await work
                except LoramuxError:
                    done["at the end"] += 1

    inside(tmp_path, body)
