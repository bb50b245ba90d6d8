"""The engine process as the front sees it: what it said of itself, and what it is told."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from loramux import wire
from loramux.config import ServerConfig
from loramux.errors import Conflict, NotFound, Overloaded
from loramux.front.ledger import Ledger
from loramux.front.observations import Observations
from loramux.front.supervisor import Supervisor
from loramux.metrics.stats import StepStats

log = logging.getLogger(__name__)

CommandKind = Literal["pin", "unpin", "evict", "drain", "state"]


class EngineClient:
    """Sends requests to the engine, feeds what comes back to the ledger, notices when it dies.

    A death fails every unfinished request with EngineFailed; the supervisor starts the next engine,
    whose words carry the next epoch: those of any other are dropped.
    Two watchdogs run from readiness on: silence for ``config.heartbeat_timeout_s``, and a step
    longer than ``config.step_timeout_s``.
    """

    name = "engine"

    def __init__(
        self,
        config: ServerConfig,
        executable: Sequence[str],
        ledger: Ledger,
        observations: Observations,
        on_ready: Callable[[wire.Ready], None],
    ) -> None:
        self._config = config
        self._executable = executable
        self._ledger = ledger
        self._observations = observations
        self._on_ready = on_ready
        self._supervisor: Supervisor | None = None
        self._commands: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_command = 0
        self._epoch = 0
        self._heard_at = 0.0
        self._polled_at = 0.0
        self._poll_s = min(0.25, config.heartbeat_timeout_s / 4)
        self._step_running_s = 0.0
        self.info: wire.Ready | None = None

    def start(self, directory: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Start the process and keep one running."""
        self._supervisor = Supervisor(self, directory, context, self._poll_s)
        self._supervisor.start()

    async def stop(self) -> None:
        """End the process for good."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        self._drop_all("the server was shut down before the request was done")

    @property
    def given_up(self) -> bool:
        """It died too often; no other will be started."""
        return self._supervisor is not None and self._supervisor.given_up

    @property
    def backlog(self) -> int:
        """Messages it has not taken yet."""
        return self._supervisor.backlog if self._supervisor is not None else 0

    def submit(self, choice: wire.Submit) -> None:
        """Hand over a choice."""
        self._send(choice)

    def abort(self, request_ids: list[str]) -> None:
        """Nothing more is wanted of these."""
        if self.info is not None:
            self._send(wire.Abort(request_ids))

    async def ask(self, kind: CommandKind, digest: str | None = None) -> dict[str, Any]:
        """One Command and the payload of its Reply."""
        if self.info is None:
            raise Overloaded("the engine is not running", code="engine_starting")
        self._last_command += 1
        command_id = self._last_command
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._commands[command_id] = future
        self._send(wire.Command(command_id=command_id, kind=kind, digest=digest))
        try:
            return await future
        finally:
            self._commands.pop(command_id, None)

    def _send(self, message: wire.ToEngine) -> None:
        assert self._supervisor is not None
        self._supervisor.send(wire.encode(message))

    # What the supervisor asks and tells (supervisor.Charge).

    def command(self, epoch: int, address: str) -> Sequence[str]:
        """See Charge."""
        options = ["--socket", address, "--epoch", str(epoch), "--parent", str(os.getpid())]
        return [*self._executable, *options]

    def stdin(self) -> bytes:
        """The configuration as one line of JSON."""
        return self._config.model_dump_json().encode() + b"\n"

    def born(self, epoch: int) -> None:
        """See Charge."""
        self._epoch = epoch
        self._step_running_s = 0.0
        self._observations.engine_started(epoch)

    def received(self, message: bytes) -> None:
        """See Charge."""
        self._heard_at = time.monotonic()
        event = wire.decode_from_engine(message)
        if event.engine_epoch != self._epoch:
            log.warning(
                "dropped a %s of engine %d, the current one is %d",
                type(event).__name__,
                event.engine_epoch,
                self._epoch,
            )
            return
        match event:
            case wire.StepDone():
                assert self._supervisor is not None
                self._supervisor.progress()
                if aborts := self._ledger.apply(event):
                    self.abort(aborts)
                self._observations.step(msgspec.convert(event.stats, StepStats))
            case wire.Heartbeat():
                self._step_running_s = event.step_running_s
            case wire.Reply():
                self._answer(event)
            case wire.Ready():
                self.info = event
                self._polled_at = self._heard_at
                self._on_ready(event)

    def _answer(self, reply: wire.Reply) -> None:
        future = self._commands.get(reply.command_id)
        if future is None or future.done():  # whoever asked has left
            return
        if reply.error is None:
            future.set_result(reply.payload)
            return
        code, message = reply.error
        kind = NotFound if code.endswith("not_found") else Conflict
        future.set_exception(kind(message, code=code))

    def overdue(self) -> str | None:
        """See Charge."""
        if self.info is None:
            return None
        now = time.monotonic()
        if now - self._polled_at > 3 * self._poll_s:
            # This process was held up itself: what the engine said meanwhile is still unread.
            self._heard_at = now
        self._polled_at = now
        if now - self._heard_at > self._config.heartbeat_timeout_s:
            return "heartbeat"
        if self._step_running_s > self._config.step_timeout_s:
            return "step_timeout"
        return None

    def died(self, reason: str) -> None:
        """See Charge."""
        self._drop_all(f"the engine process ended ({reason}) before the request was done")
        self._observations.engine_restarted(reason.split()[0].rstrip(":"))

    def _drop_all(self, message: str) -> None:
        self.info = None
        self._ledger.fail_all(message)
        for future in self._commands.values():
            if not future.done():
                future.set_exception(Overloaded("the engine ended", code="engine_starting"))
