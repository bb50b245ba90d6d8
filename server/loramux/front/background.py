"""Threads and tasks on which the adapters' slow work runs, beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, TypeVarTuple

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_UPLOAD_THREADS = 4


class Background:
    """``disk``: the one thread of the registry, and of all that has to agree with it; ``uploads``:
    threads that write what arrives. ``stop`` ends everything."""

    def __init__(self) -> None:
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self.uploads = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="upload")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def on_disk(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """What the function returns or raises, run on the registry's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.disk, function, *arguments)

    async def on_uploads(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """The same on a thread that may take its time."""
        return await asyncio.get_running_loop().run_in_executor(self.uploads, function, *arguments)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that is held until it ends; what it raises is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("work on an adapter failed", exc_info=error)

    async def stop(self) -> None:
        """Cancel the tasks, finish what runs on the threads."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.uploads.shutdown(wait=True)
        self.disk.shutdown(wait=True)
