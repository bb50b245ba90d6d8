"""Uploads that kill themselves, each at another system call.

    python -m tests.adapters.upload_child WAY BEFORE FOLDER

In one of the three WAYS (see ``tests.killing``); every SQL statement is a point too. What the
uploader was told before the death is in FOLDER/N.told, a line each.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.killing import Point, kill_at_points, told

from loramux.adapters.blobs import BlobStore
from loramux.adapters.registry import Registry
from loramux.config import ServerConfig
from loramux.errors import NotFound
from loramux.front.background import Background
from loramux.front.blobs import BlobService
from loramux.front.keys import NO_LIMITS
from loramux.front.quotas import Quotas
from loramux.front.resumable import ResumableUploads

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', b"w" * 3_999 + b"x" * 6_001
FILES = (CONFIG, WEIGHTS)
PART = 4_000


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Server:
    """The storage half of a server, as a start makes it, without HTTP and engine.

    ``told``: what an uploader has been answered, in order. ``point`` is called where the process
    might die.
    """

    def __init__(self, data_dir: Path, point: Point = lambda *_: None) -> None:
        self.point = point
        self.told: list[str] = []
        self.data_dir = data_dir
        self.config = ServerConfig(data_dir=data_dir)
        self.registry = Registry(data_dir)
        self.registry.database.connection.set_trace_callback(point)
        self.store = BlobStore(data_dir)
        self.store.sweep()
        self.background = Background()
        self.blobs = BlobService(
            self.config,
            self.registry,
            self.store,
            self.background,
            Quotas(lambda _: NO_LIMITS, lambda _: None),
        )
        self.resumable = ResumableUploads(
            self.config, self.registry.database, self.store, self.blobs, self.background
        )
        self.blobs.collect_all()

    def close(self) -> None:
        self.background.disk.shutdown()
        self.background.uploads.shutdown()
        self.registry.close()

    def tell(self, what: str) -> None:
        """The uploader has an answer."""
        self.told.append(what)
        self.data_dir.with_suffix(".told").write_text("\n".join(self.told))
        self.point()

    async def _settled(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for what the work has set going, too: the points come in one order."""
        result = await work
        while tasks := list(self.background._tasks):
            await asyncio.wait(tasks)
        return result

    async def _body(self, data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), PART):
            self.point()
            yield data[start : start + PART]

    async def multipart(self) -> None:
        """As the parts of one request."""
        async with AsyncExitStack() as stack:
            for data in FILES:
                writer = await self.blobs.begin(len(data), "part")
                stack.push_async_callback(writer.abort)
                async for piece in self._body(data):
                    await writer.write(piece)
                await writer.commit()
            self.register()

    async def whole(self) -> None:
        """As blobs, and JSON that names them."""
        for data in FILES:
            await self._settled(self.blobs.put("", sha(data), self._body(data)))
            self.tell(f"blob {sha(data)}")
        await self.name_blobs()

    async def in_parts(self) -> None:
        """The weights as a resumable upload, continued if there is one."""
        await self._settled(self.blobs.put("", sha(CONFIG), self._body(CONFIG)))
        upload_id, offset = await self._upload()
        while offset < len(WEIGHTS):
            body = self._body(WEIGHTS[offset : offset + PART + 1])
            offset = await self.resumable.append("", upload_id, offset, 0, body)
            self.tell(f"offset {offset}")
        await self._settled(self.resumable.complete("", upload_id))
        self.tell(f"blob {sha(WEIGHTS)}")
        await self.name_blobs()

    async def _upload(self) -> tuple[str, int]:
        for line in told(self.data_dir):
            kind, _, value = line.partition(" ")
            if kind == "upload":
                try:
                    _, offset = await self.resumable.show("", value)
                    return value, offset
                except NotFound:
                    break
        made = await self.resumable.create("", len(WEIGHTS), sha(WEIGHTS))
        self.tell(f"upload {made.id}")
        return made.id, 0

    async def name_blobs(self) -> None:
        async with AsyncExitStack() as stack:
            for data in FILES:
                await stack.enter_async_context(self.blobs.claim("", sha(data), "x"))
            self.register()

    def register(self) -> None:
        row, _ = self.registry.create("new", config_digest=sha(CONFIG), weights_digest=sha(WEIGHTS))
        self.registry.mark_ready(row.id, fingerprint="base", report={"rank": 1})
        self.tell("ready")

    async def run(self, way: str) -> None:
        await self._settled(getattr(self, way)())


def upload(data_dir: Path, way: str, point: Point = lambda *_: None) -> None:
    """One upload from a server's start to its end."""
    server = Server(data_dir, point)
    asyncio.run(server.run(way))
    server.close()


def main() -> None:
    way, before, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    kill_at_points(before, folder, lambda data_dir, point: upload(data_dir, way, point))


if __name__ == "__main__":
    main()
