"""How a server ends: not ready at once, then what runs may finish, then whoever is left is told.

uvicorn alone would close its listener first, so that probes and new requests meet a dead port while
streams go on without a limit. Here it only comes to that when everything is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Generator, Sequence

import uvicorn

from loramux.errors import Overloaded
from loramux.front.front import Front

log = logging.getLogger("loramux")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_BROKEN = 70
"""A bug has ended what keeps the books of requests (EX_SOFTWARE of sysexits.h)."""

_POLL_S = 0.02
_FLUSH_S = 1
"""For the last words to reach those who read."""


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to a Drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """See uvicorn; captures none."""
        yield


class Drain:
    """The first signal begins to drain; the second ends everything at once, as does a broken front.

    ``exit_code`` is 0, also when time was up and the last requests ended with an error, 128 and the
    signal's number when it was a second one, and EXIT_BROKEN. ``servers`` may be added to until
    they run.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._hurry = asyncio.Event()
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    @property
    def asked(self) -> bool:
        """Somebody wants the server to end."""
        return self._asked.is_set()

    def _on_signal(self, number: int) -> None:
        if self.asked:
            log.warning("told twice: ending at once")
            self.exit_code = 128 + number
            self._hurry.set()
        self._asked.set()

    async def mind(self, front: Front) -> None:
        """End everything when the front is broken."""
        await front.broken.wait()
        log.critical("ending at once: the server's own books are broken")
        self.exit_code = EXIT_BROKEN
        self._hurry.set()
        self._asked.set()

    async def run(self, front: Front, servers: Sequence[Server]) -> None:
        """Wait until the end is asked for, and bring it about."""
        await self._asked.wait()
        front.drain()
        begun = {task for server in servers for task in server.server_state.tasks}
        if front.unfinished or begun:
            log.info(
                "draining: %d choices are unfinished; up to %.0f s, a second signal ends at once",
                front.unfinished,
                front.config.drain_s,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(front.config.drain_s):
                while not self._hurry.is_set() and (
                    front.unfinished or any(not task.done() for task in begun)
                ):
                    await asyncio.sleep(_POLL_S)
        try:
            if front.unfinished:
                log.warning("%d choices were cut short", front.unfinished)
                front.cut(Overloaded("the server stops", code="draining"))
        finally:
            for server in servers:
                server.config.timeout_graceful_shutdown = _FLUSH_S
                server.should_exit = True
