"""Files on their way in, written beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar, TypeVarTuple

from loramux.adapters.blobs import BlobWriter
from loramux.adapters.partial import PartialFile
from loramux.errors import PayloadTooLarge

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_BUFFER_BYTES = 1 << 20
"""Bytes gathered before a thread is asked to write them."""


class _Sink(Protocol):
    def write(self, data: memoryview) -> None: ...


class _Buffered:
    """Gathers small pieces and has a thread write large ones. Methods are called one by one."""

    def __init__(self, sink: _Sink, executor: Executor) -> None:
        self._sink = sink
        self._executor = executor
        self._buffer = bytearray()
        self._running: asyncio.Future[Any] | None = None

    async def _gather(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        if data:
            await self._call(self._sink.write, memoryview(data))

    async def _call(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        # A cancelled caller leaves its thread running: whoever comes next (abort) waits for it.
        if self._running is not None:
            await asyncio.wait([self._running])
        loop = asyncio.get_running_loop()
        self._running = future = loop.run_in_executor(self._executor, function, *arguments)
        return await asyncio.shield(future)


class UploadWriter(_Buffered):
    """Streams one blob to the disk.

    Its owner calls ``abort`` in the end whatever happened: until then a committed blob is kept even
    when no adapter refers to it (yet).
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
        super().__init__(writer, executor)
        self._writer = writer
        self._limit_bytes = limit_bytes
        self._param = param
        self._hold = hold
        self._let_go = let_go
        self._digest: str | None = None
        self.num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Raises PayloadTooLarge at the limit byte, StorageFull when the disk is full."""
        self.num_bytes += len(data)
        if self.num_bytes > self._limit_bytes:
            await self.abort()
            raise PayloadTooLarge(
                f"the file is larger than {self._limit_bytes} bytes", param=self._param
            )
        await self._gather(data)

    async def commit(self, expected: str | None = None) -> str:
        """Make the file durable; its SHA-256 (64 lower-case hex).

        Raises InvalidRequest (digest_mismatch) when that is not ``expected``.
        """
        await self._flush()
        digest = self._writer.digest
        # Before it has its name: an older blob of that name may be about to be collected.
        self._hold(digest)
        self._digest = digest
        return await self._call(self._writer.commit, expected)

    async def abort(self) -> None:
        """Leave nothing that no adapter refers to. Idempotent."""
        self._buffer.clear()
        try:
            await self._call(self._writer.abort)
        finally:
            digest, self._digest = self._digest, None
            if digest is not None:
                self._let_go(digest)


class AppendWriter(_Buffered):
    """Streams one part of a resumable upload to the disk. Ends with ``keep`` or ``undo``."""

    def __init__(self, file: PartialFile, num_bytes: int, executor: Executor) -> None:
        """``num_bytes``: the size of the whole upload."""
        super().__init__(file, executor)
        self._file = file
        self._num_bytes = num_bytes
        self.offset = file.start

    async def write(self, data: bytes) -> None:
        """Raises PayloadTooLarge at the first byte past the declared end, and StorageFull."""
        self.offset += len(data)
        if self.offset > self._num_bytes:
            raise PayloadTooLarge(
                f"the upload was announced with {self._num_bytes} bytes", param="bytes"
            )
        await self._gather(data)

    async def keep(self) -> int:
        """Make durable what has arrived; the new offset."""
        try:
            await self._flush()
        except BaseException:
            await self.undo()
            raise
        return await self._call(self._file.keep)

    async def undo(self) -> None:
        """Forget what this part brought."""
        self._buffer.clear()
        await self._call(self._file.undo)
