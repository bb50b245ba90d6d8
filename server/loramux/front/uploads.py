"""A weights file on its way in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

from loramux.adapters.blobs import BlobWriter
from loramux.errors import PayloadTooLarge

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_BUFFER_BYTES = 1 << 20
"""Bytes gathered before a thread is asked to write them."""


class UploadWriter:
    """Streams one blob to the disk beside the event loop.

    Its owner calls ``abort`` in the end whatever happened: until then a committed blob is kept even
    when no adapter refers to it (yet). Methods are called one after the other.
    """

    def __init__(
        self,
        writer: BlobWriter,
        limit_bytes: int,
        param: str,
        executor: Executor,
        hold: Callable[[str], None],
        let_go: Callable[[str], None],
    ) -> None:
        self._writer = writer
        self._limit_bytes = limit_bytes
        self._param = param
        self._executor = executor
        self._hold = hold
        self._let_go = let_go
        self._buffer = bytearray()
        self._digest: str | None = None
        self._running: asyncio.Future[Any] | None = None
        self.num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Raises PayloadTooLarge at the limit byte, StorageFull when the disk is full."""
        self.num_bytes += len(data)
        if self.num_bytes > self._limit_bytes:
            await self.abort()
            raise PayloadTooLarge(
                f"the file is larger than {self._limit_bytes} bytes", param=self._param
            )
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            await self._flush()

    async def commit(self) -> str:
        """Make the file durable; its SHA-256 (64 lower-case hex)."""
        await self._flush()
        self._digest = digest = await self._call(self._writer.commit)
        self._hold(digest)
        return digest

    async def abort(self) -> None:
        """Leave nothing that no adapter refers to. Idempotent."""
        digest, self._digest = self._digest, None
        if digest is not None:
            self._let_go(digest)
        self._buffer.clear()
        await self._call(self._writer.abort)

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        if data:
            await self._call(self._writer.write, memoryview(data))

    async def _call(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        # A cancelled caller leaves its thread running: whoever comes next (abort) waits for it.
        if self._running is not None:
            await asyncio.wait([self._running])
        loop = asyncio.get_running_loop()
        self._running = future = loop.run_in_executor(self._executor, function, *arguments)
        return await asyncio.shield(future)
