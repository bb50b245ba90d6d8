"""Tasks without which a server only seems to be one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Vital:
    """Spawns tasks that may end, but not by an exception: ``broken`` is set when one does.

    Then a bug has hit what keeps the books, and nobody knows any more what they are worth: requests
    would wait for ever. Whoever waits for ``broken`` ends the process, and what was acknowledged is
    on disk.
    """

    def __init__(self) -> None:
        self.broken = asyncio.Event()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task; whoever asked for it holds it."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.critical("%s broke", task.get_name(), exc_info=error)
            self.broken.set()
