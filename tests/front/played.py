"""The ingest process and the engine of an adapters' service, played in its own process."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Any, cast

from tests.adapters.peft_files import base_description
from tests.front.visible_model import is_good

from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.pack import packed_path
from loramux.config import ServerConfig
from loramux.errors import Conflict, Overloaded, ServiceError
from loramux.front.adapters import AdapterService
from loramux.front.ingest_client import IngestClient
from loramux.front.keys import NO_LIMITS
from loramux.front.observations import Observations
from loramux.front.quotas import Quotas
from loramux.front.stock import Stock
from loramux.wire import BaseDescription, IngestDone

BASE = base_description()


class Ingest:
    """Answers at once, or, while ``holding``, when it is released."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        (data_dir / "packed").mkdir(parents=True, exist_ok=True)
        self.holding = False
        self.held: list[tuple[asyncio.Future[IngestDone], IngestDone, bool]] = []
        self.blocked: set[asyncio.Task[Any] | None] = set()

    async def examine(
        self,
        config: str,
        weights: str,
        profile: str,
        heads: str,
        base: BaseDescription,
        *,
        pack: bool,
    ) -> IngestDone:
        store = BlobStore(self.data_dir)
        assert store.has(weights), "the files stay while they are examined"
        digest = adapter_digest(config, weights, profile, heads)
        done = IngestDone(job_id=1, digest=digest)
        if not is_good(store.path(config).read_bytes()):
            done = IngestDone(job_id=1, problems=["bad"], code="adapter_invalid")
        if not self.holding:
            return self.answer(done, pack)
        future: asyncio.Future[IngestDone] = asyncio.get_running_loop().create_future()
        self.held.append((future, done, pack))
        task = asyncio.current_task()
        self.blocked.add(task)
        try:
            return await future
        finally:
            self.blocked.discard(task)

    def answer(self, done: IngestDone, pack: bool) -> IngestDone:
        if pack and not done.problems:
            packed_path(self.data_dir, done.digest, BASE.fingerprint).write_bytes(b"packed")
        return done

    def release(self) -> None:
        for future, done, pack in self.held:
            future.set_result(self.answer(done, pack))
        self.held.clear()
        self.blocked.clear()

    def stop(self) -> None:
        for future, _, _ in self.held:
            future.set_exception(ServiceError("the server is shutting down"))
        self.held.clear()


class Engine:
    """Pins, leases and residents of one engine's pool."""

    def __init__(self) -> None:
        self.up, self.full = True, False
        self.pins: set[str] = set()
        self.leases: Counter[str] = Counter()
        self.resident: set[str] = set()

    async def ask(self, kind: str, digest: str) -> None:
        await asyncio.sleep(0)
        if not self.up:
            raise Overloaded("the engine is not running", code="engine_starting")
        if kind == "pin" and self.full and digest not in self.pins:
            raise Conflict("no room", code="pool_full")
        if kind == "pin":
            self.pins.add(digest)
            self.resident.add(digest)
        if kind == "unpin":
            self.pins.discard(digest)
        if kind == "evict":
            if self.leases[digest] or digest in self.pins:
                raise Conflict("the adapter is in use", code="adapter_in_use")
            self.resident.discard(digest)


class Errors(logging.Handler):
    """What background work logged as its failure."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


def _sleeps(task: asyncio.Task[Any]) -> bool:
    awaited = getattr(task.get_coro(), "cr_await", None)
    return getattr(awaited, "__qualname__", "") == "sleep"


class House:
    """An adapters' service on a data directory, between the two; made in a running event loop."""

    def __init__(self, data_dir: Path) -> None:
        self.config = ServerConfig(data_dir=data_dir, sweep_s=1e9, model=data_dir / "no demo")
        self.ingest, self.engine = Ingest(data_dir), Engine()
        self.service = AdapterService(
            self.config,
            "base",
            cast(IngestClient, self.ingest),
            self.engine.ask,
            Observations(),
            Quotas(lambda _: NO_LIMITS, lambda _: None),
        )
        self.stock = Stock(self.config, self.service)

    async def start(self) -> None:
        """An engine is ready; returns when what was there has been brought in."""
        self.stock.base_ready(BASE)
        while self.stock.starting_up:
            await asyncio.sleep(0)
        await self.settle()

    async def settle(self) -> None:
        """Until all that is going on has ended, but for verdicts that are held back, and the sweep
        sleeps."""
        while True:
            await asyncio.sleep(0)
            tasks = self.service.background._tasks - self.ingest.blocked
            going = {task for task in tasks if not _sleeps(task)}
            if not going:
                return
            await asyncio.wait(going, timeout=0.01)

    async def stop(self) -> None:
        """As a front stops."""
        self.ingest.stop()
        await self.service.stop()
