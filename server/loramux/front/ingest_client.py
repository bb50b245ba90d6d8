"""The ingest process as the front sees it: jobs go in one at a time, verdicts come out."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from loramux import wire
from loramux.errors import ServiceError
from loramux.front.supervisor import Supervisor
from loramux.front.vital import Vital

INGEST_FAILED = "ingest_failed"
"""The code of there being no verdict, for want of a process."""

_MAX_TRIES = 2


@dataclass
class _Job:
    job: wire.IngestJob | wire.BlendJob
    verdict: asyncio.Future[wire.IngestDone]
    tries: int = 0


class IngestClient:
    """Validates and packs uploads in the ingest process.

    The process holds one job at a time, so a death has one suspect: it is tried once more and then
    refused. Everyone else's jobs go on with the next process. ``examined`` hears of every verdict
    on an adapter: the seconds it took, and what is wrong ("": nothing).
    """

    name = "ingest"

    def __init__(
        self,
        executable: Sequence[str],
        data_dir: Path,
        vital: Vital,
        examined: Callable[[float, str], None] = lambda seconds, code: None,
    ) -> None:
        self._executable = executable
        self._examined = examined
        self._sent_at = 0.0
        self._data_dir = data_dir
        self._vital = vital
        self._supervisor: Supervisor | None = None
        self._jobs: deque[_Job] = deque()
        self._sent = False
        self._up = False
        self._last_id = 0

    def start(self, directory: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Start the process and keep one running."""
        self._supervisor = Supervisor(self, directory, context, self._vital)
        self._supervisor.start()

    async def stop(self) -> None:
        """End the process; unfinished jobs raise ServiceError."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        self._fail_all("the server is shutting down")

    async def examine(
        self,
        config_digest: str,
        weights_digest: str,
        profile_digest: str,
        heads_digest: str,
        base: wire.BaseDescription,
        *,
        pack: bool,
    ) -> wire.IngestDone:
        """The verdict on an adapter's blobs ("" for no profile, no heads).

        Raises ServiceError when no ingest process can be had."""
        return await self._do(
            wire.IngestJob(
                job_id=self._next_id(),
                config_digest=config_digest,
                weights_digest=weights_digest,
                profile_digest=profile_digest,
                heads_digest=heads_digest,
                base=base,
                pack=pack,
            )
        )

    async def blend(
        self,
        sources: Sequence[wire.BlendSource],
        recipe: wire.BlendRecipe,
        base: wire.BaseDescription,
        *,
        limit_bytes: int,
    ) -> wire.IngestDone:
        """What a blend became. Other jobs wait meanwhile. Raises as ``examine``."""
        return await self._do(
            wire.BlendJob(
                job_id=self._next_id(),
                sources=list(sources),
                recipe=recipe,
                base=base,
                limit_bytes=limit_bytes,
            )
        )

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    async def _do(self, job: wire.IngestJob | wire.BlendJob) -> wire.IngestDone:
        if self._supervisor is None or self._supervisor.given_up:
            raise ServiceError("the ingest process cannot be started", code=INGEST_FAILED)
        entry = _Job(job, asyncio.get_running_loop().create_future())
        self._jobs.append(entry)
        self._send_next()
        return await entry.verdict

    def _send_next(self) -> None:
        if self._up and not self._sent and self._jobs:
            assert self._supervisor is not None
            self._sent, self._sent_at = True, time.monotonic()
            self._jobs[0].tries += 1
            self._supervisor.send(wire.encode(self._jobs[0].job))

    def _fail_all(self, message: str) -> None:
        while self._jobs:
            verdict = self._jobs.popleft().verdict
            if not verdict.done():
                verdict.set_exception(ServiceError(message, code=INGEST_FAILED))

    # What the supervisor asks and tells (supervisor.Charge).

    def command(self, epoch: int, address: str) -> Sequence[str]:
        """See Charge."""
        options = ["--socket", address, "--data-dir", str(self._data_dir)]
        return [*self._executable, *options, "--parent", str(os.getpid())]

    def stdin(self) -> bytes:
        """Nothing: each job carries all it needs."""
        return b""

    def born(self, epoch: int) -> None:
        """See Charge."""
        self._up, self._sent = True, False
        self._send_next()

    def received(self, message: bytes) -> None:
        """See Charge."""
        done = wire.decode_ingest_done(message)
        if not self._sent or done.job_id != self._jobs[0].job.job_id:
            raise ValueError(f"a verdict on job {done.job_id}, which was not asked for")
        assert self._supervisor is not None
        self._supervisor.progress()
        entry = self._jobs.popleft()
        if isinstance(entry.job, wire.IngestJob):
            self._examined(time.monotonic() - self._sent_at, done.code if done.problems else "")
        if not entry.verdict.done():
            entry.verdict.set_result(done)
        self._sent = False
        self._send_next()

    def overdue(self) -> str | None:
        """See Charge. Large files take their time."""
        return None

    def died(self, reason: str) -> None:
        """See Charge."""
        self._up = False
        if self._sent and self._jobs[0].tries >= _MAX_TRIES:
            entry = self._jobs.popleft()
            if not entry.verdict.done():
                problem = f"the ingest process ended ({reason}) each time it read this adapter"
                entry.verdict.set_result(
                    wire.IngestDone(job_id=entry.job.job_id, problems=[problem])
                )
        if self._supervisor is not None and self._supervisor.given_up:
            self._fail_all("the ingest process cannot be started")
