"""Everything HTTP needs, in one object: requests, adapters, tokenizer, readiness."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import zmq

from loramux.adapters.blobs import BlobStore
from loramux.config import DEMO_DIR, ServerConfig
from loramux.errors import (
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    LoramuxError,
    Overloaded,
)
from loramux.front.adapters import AdapterService
from loramux.front.admission import QUEUED_POOLS, Admission, Claim, Room
from loramux.front.engine_client import CommandKind, EngineClient
from loramux.front.generation import Generation, GenerationSpec
from loramux.front.ingest_client import IngestClient
from loramux.front.keys import Keys
from loramux.front.ledger import Ledger
from loramux.front.observations import Observations, Observer, Snapshot
from loramux.front.quotas import Quotas
from loramux.front.stock import Stock
from loramux.front.tokenizer import TokenizerService, check_partner
from loramux.front.vital import Vital
from loramux.front.voices import Voices
from loramux.wire import Ready

__all__ = ["Admission", "Claim", "CommandKind", "Front"]

ENGINE = (sys.executable, "-m", "loramux.engine.main")
INGEST = (sys.executable, "-m", "loramux.ingest.main")

_MAX_SOCKET_PATH = 80
"""Unix domain sockets take about 100 bytes; their names need some."""


class Front:
    """One per process; every method runs on the event loop that ran ``start``.

    Raises ConfigError when the model directory has no usable tokenizer, or the data directory or
    the one for temporary files cannot be used. ``engine`` and ``ingest`` are the command lines of
    the two processes.
    """

    def __init__(
        self,
        config: ServerConfig,
        observer: Observer | None = None,
        *,
        engine: Sequence[str] = ENGINE,
        ingest: Sequence[str] = INGEST,
    ) -> None:
        self.config = config
        self.keys = Keys.of(config)
        self.base_name = config.served_model_name or _default_name(config.model)
        self.created = int(time.time())
        self.tokenizer = TokenizerService(config.model)
        for param in ("draft_model", "small_model"):
            if (partner := getattr(config, param)) is not None:
                check_partner(config.model, partner, param)
        self._lock = lock_data_dir(config.data_dir)
        self._observations = Observations(observer)
        self.quotas = Quotas(self.keys.limits, self._observations.rejected)
        self.room = Room(config.max_num_seqs + config.max_waiting, self._observations.rejected)
        self._vital = Vital()
        self._ingest = IngestClient(
            ingest, config.data_dir, self._vital, self._observations.validated
        )
        self.adapters = AdapterService(
            config, self.base_name, self._ingest, self.command, self._observations, self.quotas
        )
        self.voices = Voices(self.tokenizer, BlobStore(config.data_dir).path)
        self._stock = Stock(config, self.adapters)
        self._ledger = Ledger(
            self._observations,
            self.adapters.retain,
            self.adapters.release,
            self._ended,
            self._stock.mend,
            self.room.pace.retry_after_s,
        )
        self._engine = EngineClient(
            config, engine, self._ledger, self._observations, self._engine_ready, self._vital
        )
        self._draining = False
        self._ever_ready = False
        self._directory = make_socket_dir()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    @property
    def snapshot(self) -> Snapshot:
        """Newest engine statistics and running totals."""
        return self._observations.snapshot

    @property
    def observer(self) -> Observer | None:
        """Who sees single events (histograms); may be set at any time."""
        return self._observations.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observations.observer = observer

    @property
    def info(self) -> Ready | None:
        """What the running engine said of itself; None while there is none."""
        return self._engine.info

    @property
    def broken(self) -> asyncio.Event:
        """Set when a bug has hit what keeps the books of requests: see Vital."""
        return self._vital.broken

    @property
    def never_started(self) -> bool:
        """The engine was given up before any was ever ready: the configuration is at fault."""
        return self._engine.given_up and not self._ever_ready

    async def start(self) -> None:
        """Start the engine and ingest processes; returns before they are ready."""
        self._context = zmq.Context()
        self._engine.start(self._directory, self._context)
        self._ingest.start(self._directory, self._context)

    def _ended(self, spec: GenerationSpec, num_outputs: int) -> None:
        self.quotas.end(spec, num_outputs)
        self.room.end(spec)

    def _engine_ready(self, info: Ready) -> None:
        self._ever_ready = True
        pool = info.num_frames * info.page_tokens
        waiting = self.config.max_waiting_tokens
        more = QUEUED_POOLS * pool if waiting is None else waiting
        self.room.max_tokens = max(info.max_model_len, pool + more)
        self._stock.base_ready(info.base, info.partners)

    @property
    def unfinished(self) -> int:
        """Choices accepted and not ended."""
        return len(self._ledger)

    @property
    def draining(self) -> bool:
        """No new requests are taken, and none will be."""
        return self._draining

    def drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._draining = True

    def cut(self, error: LoramuxError) -> None:
        """End every unfinished choice with ``error``."""
        self._ledger.fail_all(error)

    async def stop(self) -> None:
        """Refuse new requests, let running ones go on for ``config.drain_s``, end everything.

        Idempotent. Requests that are not done by then end with Overloaded (draining). Should the
        engine die meanwhile, the next one goes on with them.
        """
        self.drain()
        deadline = time.monotonic() + self.config.drain_s
        while self.unfinished and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.cut(Overloaded("the server stops", code="draining"))
        await self._engine.stop()
        await self._ingest.stop()
        context, self._context = self._context, None
        if context is not None:
            await self.adapters.stop()
            self.voices.close()
            self.tokenizer.close()
            context.destroy(linger=0)
        self._lock.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def not_ready(self) -> list[str]:
        """Why this server should get no requests now; empty when it should."""
        reasons = self._closed()
        if not reasons and self._stock.starting_up:
            reasons.append("adapters_starting")
        return reasons

    def _closed(self) -> list[str]:
        reasons = []
        if self._draining:
            reasons.append("draining")
        if self._engine.given_up:
            reasons.append("engine_failed")
        elif self.info is None:
            reasons.append("engine_starting")
        elif self._engine.recovering:
            reasons.append("engine_recovering")
        return reasons

    def admit(self, claim: Claim) -> Admission:
        """Reserve what a request may need; raises Overloaded at once when not ready, draining or
        full, and RateLimited when the tenant has its share.

        Raises InvalidRequest when it would not fit an idle server (or its share) either.
        """
        if closed := self._closed():
            raise self.room.refuse(f"the server takes no requests: {closed[0]}", code=closed[0])
        # The backlog grows only while the engine takes nothing and clients come and leave.
        if self._engine.backlog > 2 * self.room.places:
            raise self.room.refuse("the engine is behind")
        return Admission(self.room, self.quotas, claim)

    def submit(self, spec: GenerationSpec) -> Generation:
        """Hand one choice to the engine; never blocks.

        Raises InvalidRequest or ContextLengthExceeded for a prompt the engine cannot take, Conflict
        when its adapter, or the small model's, has gone since it was resolved, DeadlineExceeded,
        Overloaded when the engine has gone since ``admit``.
        """
        info, closed = self.info, self._closed()
        if closed or info is None:
            raise self.room.refuse(f"the server takes no requests: {closed[0]}", code=closed[0])
        _check_prompt(spec, info)
        for adapter in spec.adapters:
            self.adapters.require(adapter.digest)
        if spec.companions:
            adaptive = spec.entropy is not None
            there = self.adapters.still_there(spec.companions, adaptive=adaptive)
            spec = replace(spec, companions=there)
        if spec.deadline_s is not None and spec.arrived_at + spec.deadline_s <= time.monotonic():
            raise DeadlineExceeded("the request's deadline passed before it could start")
        spec = replace(spec, pool_share=self.quotas.pool_share(spec.tenant))
        text = self.tokenizer.stream(
            stop=spec.stop,
            include_stop=spec.include_stop,
            skip_special_tokens=spec.skip_special_tokens,
            min_tokens=spec.sampling.min_tokens,
        )
        generation = Generation(spec, self._cancel)
        entry = self._ledger.add(spec, generation, text)
        self.quotas.start(spec)
        self.room.start(spec)
        self._observations.submitted(spec)
        self._engine.submit(entry)
        return generation

    def _cancel(self, request_id: str) -> None:
        if self._ledger.cancel(request_id):
            self._engine.abort([request_id])

    async def canary(self) -> bool:
        """Whether the engine makes the token of a fixed prompt that it made when first asked.
        Raises Overloaded without one, or when it has no room."""
        return await self._engine.canary()

    async def command(self, kind: CommandKind, digest: str | None = None) -> dict[str, Any]:
        """An operator's command to the engine; its Reply's payload. Raises Overloaded without one.

        An error in the Reply is raised as NotFound or Conflict with the engine's code and message.
        """
        return await self._engine.ask(kind, digest)


def make_socket_dir() -> Path:
    """A directory for this process's sockets that nobody else may enter. Raises ConfigError."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="loramux-"))
    except OSError as error:
        raise ConfigError(f"no place for sockets; set TMPDIR: {error.strerror}") from error
    if len(str(directory)) > _MAX_SOCKET_PATH:
        directory.rmdir()
        raise ConfigError(f"{directory} is too long for a socket; set TMPDIR to a shorter path")
    return directory


def lock_data_dir(data_dir: Path) -> IO[bytes]:
    """The data directory is this process's alone until the file is closed; two servers would
    sweep away each other's uploads. Raises ConfigError when another has it."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = open(data_dir / "lock", "wb")  # held open for as long as the server lives
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir}: {error.strerror}", param="data_dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"--data-dir {data_dir} is in use by another server", param="data_dir"
        ) from error
    return file


def _check_prompt(spec: GenerationSpec, info: Ready) -> None:
    prompt, max_tokens = spec.prompt_ids, spec.sampling.max_tokens
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        raise InvalidRequest(
            f"token ids are 0 to {info.vocab_size - 1}; the prompt has another", param="prompt"
        )
    if len(prompt) + max_tokens > info.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; together they may"
            f" be {info.max_model_len}",
            param="prompt",
        )


def _default_name(model: Path) -> str:
    return "demo" if model == DEMO_DIR / "base" else model.resolve().name
