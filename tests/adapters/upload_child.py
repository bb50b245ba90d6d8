"""Uploads that kill themselves, each at another system call.

    python -m tests.adapters.upload_child WAY BEFORE FOLDER

For N = 1, 2, ... copies the data directory BEFORE to FOLDER/N and uploads an adapter there, in one
of the three WAYS, in a forked process that dies at the N-th point: every call that changes the disk
and every SQL statement is one. Ends after the first upload that lived. What the uploader was told
before the death is in FOLDER/N.told, a line each. Forking keeps this fast, and is safe here: the
parent has one thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

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
SYSTEM_CALLS = ("fsync", "replace", "mkdir", "open", "unlink")
Point = Callable[..., None]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Executioner:
    """Counts points of no return and dies at one."""

    def __init__(self, kill_at: int) -> None:
        self.left = kill_at

    def point(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.point()
            return call(*args, **kwargs)

        return wrapped


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


def told(data_dir: Path) -> list[str]:
    """What the uploader of this data directory was told before the death."""
    path = data_dir.with_suffix(".told")
    return path.read_text().splitlines() if path.exists() else []


def upload(data_dir: Path, way: str, point: Point = lambda *_: None) -> None:
    """One upload from a server's start to its end."""
    server = Server(data_dir, point)
    asyncio.run(server.run(way))
    server.close()


def main() -> None:
    way, before, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for number in itertools.count(1):
        data_dir = folder / str(number)
        shutil.copytree(before, data_dir)
        child = os.fork()
        if child == 0:
            executioner = Executioner(number)
            for name in SYSTEM_CALLS:
                setattr(os, name, executioner.before(getattr(os, name)))
            upload(data_dir, way, executioner.point)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            sys.exit(f"upload {number} failed with {status}")


if __name__ == "__main__":
    main()
