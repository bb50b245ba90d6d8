"""What the ingest process says of each adapter: asked once at a time, and written down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from loramux.adapters.registry import AdapterRow
from loramux.errors import (
    AdapterInvalid,
    LoramuxError,
    NotFound,
    ServiceError,
    StorageFull,
    in_short,
)
from loramux.front.background import Background
from loramux.front.catalog import AdapterView
from loramux.front.ingest_client import INGEST_FAILED, IngestClient
from loramux.front.observations import Observations
from loramux.front.packed import PackedFiles
from loramux.front.pins import Pins
from loramux.front.shelf import Shelf
from loramux.request import Role
from loramux.wire import BaseDescription, IngestDone

log = logging.getLogger(__name__)

Files = tuple[str, str, str, str]
"""The digests of an adapter's config, weights, profile and heads; "" for one that it has not."""

NOT_THE_ADAPTERS_FAULT = frozenset({"storage_full", "internal_error"})
"""Verdicts that say something of this server now and nothing of the adapter."""


def refusal(code: str, message: str, problems: Sequence[str]) -> LoramuxError:
    """A bad verdict as an error: the adapter's, or this server's own."""
    if code == StorageFull.code:
        return StorageFull(message)
    if code in (LoramuxError.code, INGEST_FAILED):
        return ServiceError(message, code=code)
    return AdapterInvalid(message, problems=problems, code=code)


class Verdicts:
    """Validation of registered adapters, and of files nobody registers.

    ``deleted`` hears of rows that may have gone while they were being examined, ``failed``, on the
    registry's thread, of those refused.
    """

    def __init__(
        self,
        shelf: Shelf,
        ingest: IngestClient,
        observations: Observations,
        background: Background,
        *,
        packed: PackedFiles,
        pins: Pins,
        deleted: Callable[[AdapterRow], None],
        failed: Callable[[AdapterRow], None],
    ) -> None:
        self._shelf = shelf
        self._ingest = ingest
        self._observations = observations
        self._background = background
        self._packed = packed
        self._pins = pins
        self._deleted = deleted
        self._failed = failed
        self._running: dict[int, asyncio.Task[None]] = {}

    def __contains__(self, row_id: int) -> bool:
        """Whether the row is being examined."""
        return row_id in self._running

    async def wait(self, row: AdapterRow, timeout_s: float) -> None:
        """Until the verdict on a row is in, or the time is over."""
        if running := self._running.get(row.id):
            await asyncio.wait([running], timeout=timeout_s)

    async def wait_all(self) -> None:
        """Until all that are under way are in."""
        if self._running:
            await asyncio.wait(list(self._running.values()))

    def begin(self, row: AdapterRow, base: BaseDescription) -> None:
        """Have a registered adapter examined and packed, unless it is being already, or was deleted
        since: then nobody would remove what is packed."""
        now = self._shelf.catalog.find(row)
        if row.id not in self._running and now is not None and now.status != "deleting":
            task = self._running[row.id] = self._background.spawn(self._examine(row, base))
            task.add_done_callback(lambda task: self._ended(task, row, base))

    def _ended(self, task: asyncio.Task[None], row: AdapterRow, base: BaseDescription) -> None:
        # What was deleted, or tried again, at any moment before this one was left to this one.
        del self._running[row.id]
        if task.cancelled() or task.exception():
            return
        now = self._shelf.catalog.row(row)
        if now.status == "validating":
            self.begin(now, base)
        self._deleted(now)

    async def _ask(self, row: AdapterRow, base: BaseDescription) -> IngestDone:
        files = row.config_digest, row.weights_digest, row.profile_digest, row.heads_digest
        try:
            done = await self._ingest.examine(*files, base, pack=True)
        except ServiceError as error:
            return IngestDone(job_id=0, problems=[error.message], code=error.code)
        if not done.problems and done.digest != row.digest:
            return IngestDone(job_id=0, problems=["its files changed on disk"], code="corrupt")
        return done

    async def _examine(self, row: AdapterRow, base: BaseDescription) -> None:
        done = await self._ask(row, base)
        if row.status == "ready" and done.code in NOT_THE_ADAPTERS_FAULT and done.problems:
            log.error("could not pack %s again: %s", row.name, done.problems[0])
            return
        try:
            while not await self._background.on_disk(self._record, row, done, base.fingerprint):
                done = await self._ask(row, base)
        except NotFound:  # deleted meanwhile
            await self._shelf.refresh(row.tenant, row.name)
            await self._background.on_disk(self._packed.forget, replace(row, report=done.report))
            return
        self._shelf.catalog.unpacked.discard(row.digest)
        await self._shelf.refresh(row.tenant, row.name)
        self._observations.uploaded(done.code if done.problems else "ready")
        await self._pins.tell()  # a pin moves on to a new generation

    def _record(self, row: AdapterRow, done: IngestDone, fingerprint: str) -> bool:
        """Write the verdict down; False if it is good and a file of it is gone again: its basis was
        there, and went with the last adapter that was known to need it."""
        registry = self._shelf.registry
        if done.problems:
            registry.mark_failed(row.id, code=done.code, problems=done.problems)
            self._failed(row)
        elif self._packed.lacks(replace(row, report=done.report), fingerprint):
            return False
        else:
            registry.mark_ready(row.id, fingerprint=fingerprint, report=done.report)
        return True

    async def preview(
        self,
        name: str,
        files: Files,
        model: BaseDescription,
        blend: Mapping[str, Any] | None = None,
        *,
        base: Role,
    ) -> AdapterView:
        """What an upload would become: generation 0, registered nowhere. Raises as ``refusal``."""
        done = await self._ingest.examine(*files, model, pack=False)
        if done.problems:
            raise refusal(done.code, in_short(done.problems), done.problems)
        return AdapterView(
            id=f"{name}@0",
            name=name,
            digest=done.digest,
            generation=0,
            base=base,
            status="ready",
            rank=done.report.get("rank", 0),
            num_bytes=done.report.get("num_bytes", 0),
            num_frames=done.report.get("num_frames", 0),
            profile_digest=files[2],
            heads_digest=files[3],
            report=done.report if blend is None else {**done.report, "blend": blend},
        )
