"""Lives of an adapter that end with the server's death, each at another system call.

    python -m tests.front.life_child BEFORE FOLDER EVERY

For N = 1, 1 + EVERY, ... copies the data directory BEFORE to FOLDER/N and uploads, pins, replaces,
unpins and deletes an adapter, in a forked process that dies at the N-th point (as in
``tests.adapters.upload_child``). What was answered before is in FOLDER/N.told, a line each. Ends
after the first life that was whole.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from tests.adapters.upload_child import SYSTEM_CALLS, Executioner, Point
from tests.front.played import House


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
    for number in itertools.count(1, every):
        data_dir = folder / str(number)
        shutil.copytree(before, data_dir)
        child = os.fork()
        if child == 0:
            executioner = Executioner(number)
            for name in SYSTEM_CALLS:
                setattr(os, name, executioner.before(getattr(os, name)))
            asyncio.run(live(data_dir, executioner.point))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            sys.exit(f"life {number} failed with {status}")


if __name__ == "__main__":
    main()
