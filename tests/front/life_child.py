"""Lives of an adapter that end with the server's death, each at another system call.

    python -m tests.front.life_child BEFORE FOLDER EVERY

A life uploads, pins, replaces, unpins and deletes an adapter (see ``tests.killing``); every SQL
statement is a point too. What was answered before is in FOLDER/N.told, a line each.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.front.played import House
from tests.killing import Point, kill_at_points


async def upload(house: House, name: str, weights: bytes, expected: int | None = None) -> None:
    """As the parts of one request, with its verdict."""
    writer = await house.service.begin()
    try:
        await writer.write(weights)
        digest = await writer.commit()
        view = await house.service.create(
            name, b"{}", digest, wait_s=60, expected_generation=expected
        )
        assert view.status == "ready"
    finally:
        await writer.abort()


async def live(data_dir: Path, point: Point) -> None:
    """Five answers, and the server's end."""
    house = House(data_dir)
    service = house.service
    service.shelf.registry.database.connection.set_trace_callback(point)
    await house.start()
    told: list[str] = []
    for name, work in (
        ("uploaded", lambda: upload(house, "new", b"one")),
        ("pinned", lambda: service.set_pinned("new", True)),
        ("replaced", lambda: upload(house, "new", b"two", 1)),
        ("unpinned", lambda: service.set_pinned("new", False)),
        ("deleted", lambda: service.delete("new")),
    ):
        await work()
        told.append(name)
        data_dir.with_suffix(".told").write_text("\n".join(told))
        point()
    await house.settle()
    await house.stop()


def main() -> None:
    before, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    kill_at_points(
        before, folder, lambda data_dir, point: asyncio.run(live(data_dir, point)), every
    )


if __name__ == "__main__":
    main()
