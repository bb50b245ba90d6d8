"""Keeps one child process running, with a private socket to it for each of its lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import zmq

from loramux.config import process_environment
from loramux.front.pipe import Pipe
from loramux.front.vital import Vital

log = logging.getLogger(__name__)

MISCONFIGURED = "exit 2"
"""How a process says that it cannot start as configured: another try would end the same way."""

MAX_DEATHS = 5
"""Deaths in a row, without ``progress`` between, after which a process is given up."""

_OWN_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_BACKOFF_S = (0.0, 0.2, 1.0, 2.0, 4.0)
_TERMINATE_S = 3.0
"""How long a process may take to end by itself when asked."""


def external(reason: str) -> bool:
    """Whether somebody else ended the process whose life ended for this ``reason``: by a signal
    that was not sent from here, and that no process gets for what it does itself."""
    word, _, code = reason.partition(" ")
    return word == "exit" and int(code) < 0 and -int(code) not in _OWN_FAULTS


class Charge(Protocol):
    """What is supervised. Methods run on the event loop and are quick."""

    name: str

    def command(self, epoch: int, address: str) -> Sequence[str]:
        """The command line of this life."""

    def stdin(self) -> bytes:
        """What the process reads first."""

    def born(self, epoch: int) -> None:
        """The process was started."""

    def received(self, message: bytes) -> None:
        """It said something. An exception raised here costs it its life."""

    def overdue(self) -> str | None:
        """Polled: a reason to kill it now, such as silence."""

    def died(self, reason: str) -> None:
        """It is gone; the next life, if any, begins after this returns."""


class Supervisor:
    """Runs a Charge, restarts it with growing pauses, and gives up after MAX_DEATHS in a row.

    The front binds a PAIR socket in a private directory, the process connects to it; a new life
    gets a new socket, so nothing of an old one is ever read.
    """

    def __init__(
        self,
        charge: Charge,
        directory: Path,
        context: zmq.Context[zmq.Socket[bytes]],
        vital: Vital,
        poll_s: float = 0.25,
    ) -> None:
        self._charge = charge
        self._vital = vital
        self._directory = directory
        self._context = context
        self._poll_s = poll_s
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._deaths = 0
        self._epoch = 0
        self._task: asyncio.Task[None] | None = None
        self.given_up = False

    @property
    def backlog(self) -> int:
        """Messages the process has not taken yet."""
        return self._outbox.qsize()

    def start(self) -> None:
        """Begin the first life."""
        self._task = self._vital.spawn(self._run(), f"{self._charge.name} supervisor")

    async def stop(self) -> None:
        """End the process and do not start another. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def send(self, message: bytes) -> None:
        """Queue a message for this life; what it never reads is lost with it."""
        self._outbox.put_nowait(message)

    def progress(self) -> None:
        """The process did its work: earlier deaths are forgiven."""
        self._deaths = 0

    async def _run(self) -> None:
        name = self._charge.name
        while not self.given_up:
            await asyncio.sleep(_BACKOFF_S[self._deaths])
            self._epoch += 1
            reason = await self._live()
            self._deaths += 1
            self.given_up = self._deaths >= MAX_DEATHS or reason == MISCONFIGURED
            log.error(
                "the %s process is gone (%s), %s",
                name,
                reason,
                f"given up after {self._deaths}" if self.given_up else "starting another",
            )
            self._outbox = asyncio.Queue()
            self._charge.died(reason)

    async def _live(self) -> str:
        """One life; why it ended."""
        address = f"ipc://{self._directory}/{self._charge.name}-{self._epoch}"
        pipe = process = None
        try:
            pipe = Pipe(self._context, address)
            process = await asyncio.create_subprocess_exec(
                *self._charge.command(self._epoch, address),
                stdin=asyncio.subprocess.PIPE,
                env=process_environment(),
                # Ctrl-C in a terminal is for the front, which drains first.
                start_new_session=True,
            )
            self._charge.born(self._epoch)
            return await self._converse(process, pipe)
        except OSError as error:
            return f"start: {error}"
        finally:
            if pipe is not None:
                pipe.close()
            if process is not None:
                await _end(process)

    async def _converse(self, process: asyncio.subprocess.Process, pipe: Pipe) -> str:
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._introduce(process),
                pipe.listen(self._charge.received),
                self._transmit(pipe),
                self._watch(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finished = done.pop()
            if error := finished.exception():
                log.error("the %s process is ended", self._charge.name, exc_info=error)
                return "protocol"
            return finished.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _introduce(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(self._charge.stdin())
            await process.stdin.drain()
            process.stdin.close()
            await process.stdin.wait_closed()
        return f"exit {await process.wait()}"

    async def _transmit(self, pipe: Pipe) -> str:
        while True:
            await pipe.send(await self._outbox.get())

    async def _watch(self) -> str:
        while True:
            await asyncio.sleep(self._poll_s)
            if reason := self._charge.overdue():
                return reason


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask, then insist."""
    for end in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _TERMINATE_S)
