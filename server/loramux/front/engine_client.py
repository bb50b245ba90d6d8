"""The engine process as the front sees it: what it said of itself, and what it is told."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from loramux import wire
from loramux.config import ServerConfig
from loramux.engine import blackbox
from loramux.errors import Conflict, EngineFailed, NotFound, Overloaded
from loramux.front.canary import Canary
from loramux.front.ledger import Entry, Ledger
from loramux.front.observations import Observations
from loramux.front.recovery import Recovery
from loramux.front.supervisor import Supervisor, external
from loramux.front.suspects import Suspects
from loramux.front.vital import Vital
from loramux.memory.machine import oom_kills
from loramux.metrics.stats import StepStats

log = logging.getLogger(__name__)

STEP_SLACK = 20
"""How many times longer than predicted a step may take."""

MISMATCH = "canary"
"""Why an engine is ended that computes wrongly; no request is to blame."""

CommandKind = Literal["pin", "unpin", "evict", "drain", "state"]


class EngineClient:
    """Sends requests to the engine, feeds what comes back to the ledger, notices when it dies.

    After a death the supervisor starts the next engine, whose words carry the next epoch (those of
    any other are dropped), and every unfinished request goes on from its last token. What the
    engine was computing is read from its black box, and runs apart first, unless somebody else
    ended the process.
    Two watchdogs run from readiness on: silence for ``config.heartbeat_timeout_s``, and a step
    that takes STEP_SLACK times as long as the engine has predicted, and longer than
    ``config.step_timeout_s``.
    An engine whose canary is wrong is replaced too: nothing that it says counts any more, and of
    those after it nothing until a canary of theirs was right.
    """

    name = "engine"

    def __init__(
        self,
        config: ServerConfig,
        executable: Sequence[str],
        ledger: Ledger,
        observations: Observations,
        on_ready: Callable[[wire.Ready], None],
        vital: Vital,
    ) -> None:
        self._config = config
        self._executable = executable
        self._ledger = ledger
        self._observations = observations
        self._on_ready = on_ready
        self._vital = vital
        self._supervisor: Supervisor | None = None
        self._commands: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_command = 0
        self._epoch = 0
        self._oom_kills = 0
        self._heard_at = 0.0
        self._polled_at = 0.0
        self._box = Path()
        self._models: tuple[str, ...] | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._poll_s = min(0.25, config.heartbeat_timeout_s / 4)
        self._step = wire.Heartbeat(0)
        self._recovery = Recovery(
            ledger,
            Suspects(config.max_num_seqs),
            vital,
            give=self._give,
            take_back=self._take_back,
            probe=self.canary,
        )
        self._canary = Canary()
        self._wrong = False
        self._doubted = False
        self.info: wire.Ready | None = None

    def start(self, directory: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Start the process and keep one running."""
        self._supervisor = Supervisor(self, directory, context, self._vital, self._poll_s)
        self._supervisor.start()
        self._expiring = self._vital.spawn(self._expire(), "deadlines")

    async def stop(self) -> None:
        """End the process for good, and what is unfinished with it."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._expiring is not None:
            self._expiring.cancel()
        self._gone((), blamed=False)
        self._ledger.fail_all(EngineFailed("the server was shut down before the request was done"))

    @property
    def given_up(self) -> bool:
        """It died too often; no other will be started."""
        return self._supervisor is not None and self._supervisor.given_up

    @property
    def recovering(self) -> bool:
        """It is there and still has to get by what the last one died of, or is about to be
        replaced."""
        return self._wrong or self._recovery.going_on

    @property
    def backlog(self) -> int:
        """Messages it has not taken yet."""
        return self._supervisor.backlog if self._supervisor is not None else 0

    def submit(self, entry: Entry) -> None:
        """Hand over a new choice."""
        self._recovery.give(entry)

    def abort(self, request_ids: list[str]) -> None:
        """Nothing more is wanted of these, which have ended. Without an engine nothing was."""
        if self.info is not None:
            self._send(wire.Abort(request_ids))
        self._recovery.changed()

    async def canary(self) -> bool:
        """One token of a fixed prompt through the real engine; whether it is the one that the first
        of its kind was. Raises Overloaded without an engine, when it dies of it, or has no room."""
        if self.info is None:
            raise Overloaded("the engine is not running", code="engine_starting")
        message, answer = self._canary.ask(self.info)
        self._send(message)
        return await answer

    def _sings(self, event: wire.FromEngine) -> bool:
        """No canary of this event is wrong."""
        right = self._canary.hear(event) if isinstance(event, wire.StepDone) else None
        if right is not None:
            self._wrong = self._doubted = not right
        if right is False:
            self._observations.canary_missed()
        return right is not False

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

    def _give(self, entry: Entry) -> None:
        self._send(entry.submission(time.monotonic()))

    async def _take_back(self, request_ids: Sequence[str]) -> None:
        self._send(wire.Abort(list(request_ids)))
        await self.ask("state")  # the answer comes behind all that was made of them

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            if late := self._ledger.expire(time.monotonic()):
                self.abort(late)

    # What the supervisor asks and tells (supervisor.Charge).

    def command(self, epoch: int, address: str) -> Sequence[str]:
        """See Charge."""
        self._box = Path(address.removeprefix("ipc://") + "-steps")
        options = ["--socket", address, "--epoch", str(epoch), "--parent", str(os.getpid())]
        options += ["--blackbox", str(self._box)]
        return [*self._executable, *options]

    def stdin(self) -> bytes:
        """The configuration as one line of JSON."""
        return self._config.model_dump_json().encode() + b"\n"

    def born(self, epoch: int) -> None:
        """See Charge."""
        self._epoch = epoch
        self._wrong = False
        self._step = wire.Heartbeat(epoch)
        self._oom_kills = oom_kills()
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
        if self._wrong or not self._sings(event):
            return
        match event:
            case wire.StepDone():
                assert self._supervisor is not None
                if event.outputs or event.finished:
                    self._supervisor.progress()
                if aborts := self._ledger.apply(event):
                    self.abort(aborts)
                self._recovery.changed()
                self._observations.step(msgspec.convert(event.stats, StepStats))
            case wire.Heartbeat():
                self._step = event
            case wire.Reply():
                self._answer(event)
            case wire.Ready():
                self.info = event
                self._polled_at = self._heard_at
                self._on_ready(event)
                self._go_on(event)

    def _go_on(self, info: wire.Ready) -> None:
        """What is unfinished goes on, if it is with the same weights."""
        partners = (info.partners[model_id].fingerprint for model_id in sorted(info.partners))
        models = (info.base.fingerprint, *partners)
        if self._models not in (None, models):
            self._ledger.fail_all(
                EngineFailed("the model's files were changed before the request was done")
            )
        self._models = models
        for entry in self._ledger.unfinished():
            self._observations.resumed(entry.spec)
        self._recovery.begin(doubted=self._doubted)

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
        if self._wrong:
            return MISMATCH
        if self.info is None:
            return None
        now = time.monotonic()
        if now - self._polled_at > 3 * self._poll_s:
            # This process was held up itself: what the engine said meanwhile is still unread.
            self._heard_at = now
        self._polled_at = now
        if now - self._heard_at > self._config.heartbeat_timeout_s:
            return "heartbeat"
        limit_s = max(self._config.step_timeout_s, STEP_SLACK * self._step.predicted_s)
        if self._step.step_running_s > limit_s:
            return "step_timeout"
        return None

    def died(self, reason: str) -> None:
        """See Charge."""
        starved = oom_kills() > self._oom_kills
        if starved:
            log.error("the kernel ended the engine, or one beside it, for want of memory")
        blamed = reason != MISMATCH and (starved or not external(reason))
        self._gone(blackbox.read(self._box), blamed=blamed)
        self._observations.engine_restarted(reason.split()[0].rstrip(":"))
        if self.given_up:
            self._ledger.fail_all(
                EngineFailed(
                    f"the engine process ended ({reason}) before the request was done, and no other"
                    " could be started"
                )
            )

    def _gone(self, running: Iterable[str], *, blamed: bool) -> None:
        self.info = None
        self._recovery.died(list(running), blamed=blamed)
        self._canary.forget(Overloaded("the engine ended", code="engine_starting"))
        for future in self._commands.values():
            if not future.done():
                future.set_exception(Overloaded("the engine ended", code="engine_starting"))
