"""Pinned host memory -> a ring of buffers on the device -> slices of the pool.

    host tier   | block | block | block |          copies: one transfer a block
                    |       |                          v
    ring        | buffer 0 | buffer 1 | ...        spreads: one scatter launch a buffer
                    v          v
    arena       slices wherever they are free

Copies and spreads are two queues of the device beside the one that computes. Blocks follow each
other through the ring, so that the link to the host is never idle while a buffer is spread.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.arrivals import Arrival, Clock, Link, Mark
from loramux.adapters.host_tier import HostTier
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import PackedFiles
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat
from loramux.memory.shortage import is_shortage
from loramux_kernels.scatter import scatter

BLOCK_BYTES = 4 << 20
"""About what is transferred at once: large enough for the full rate of the link (a call costs
microseconds, this 80-160 of them), small enough that the last, partly used block wastes little."""
RING_BUFFERS = 4


class Lane(Protocol):
    """A queue of work on the device, done in order beside other queues (a CUDA stream)."""

    def wait(self, mark: Mark) -> None:
        """What follows begins after ``mark``."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Bring pinned memory of the host to the device; the caller leaves it as it is."""

    def scatter(
        self,
        arena: torch.Tensor,
        staged: torch.Tensor,
        offsets: torch.Tensor,
        slice_bytes: int,
    ) -> None:
        """See :func:`loramux_kernels.scatter.scatter`."""

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy of ``values`` on the device, for this and later work only."""

    def mark(self) -> Mark: ...


class Device(Protocol):
    """Where queues come from; memory that its copies are fast from."""

    def lane(self) -> Lane: ...

    def given(self) -> Mark:
        """Everything that was given to the queue that computes until now."""

    def hold(self, mark: Mark) -> None:
        """What is given to the queue that computes from now on begins after ``mark``."""

    def waited_s(self) -> float:
        """Seconds it stood still for that since the last call, as far as known."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Memory of the host, 1-D uint8."""


@dataclass(slots=True)
class _Buffer:
    staged: torch.Tensor
    spread: Mark | None = None


@dataclass(frozen=True)
class Sent:
    """Blocks on their way: when each is in the arena. The offsets are the device's until then."""

    marks: list[Mark]
    offsets: torch.Tensor


class StagingRing:
    """``num_buffers`` buffers of ``slices_per_block`` slices each, on the device of ``arena``."""

    def __init__(
        self, arena: Arena, device: Device, slices_per_block: int, num_buffers: int = RING_BUFFERS
    ) -> None:
        self._arena = arena
        self._slice_bytes = arena.frame.slice_bytes
        self._per_block = slices_per_block
        self._copies, self._spreads = device.lane(), device.lane()
        size = slices_per_block * self._slice_bytes
        like = arena.data
        self._buffers = [_Buffer(like.new_empty(size)) for _ in range(num_buffers)]
        self._next = 0
        self._turn = threading.Lock()

    def send(
        self, blocks: Sequence[torch.Tensor], slices: npt.NDArray[np.int64], after: Mark | None
    ) -> Sent:
        """Bring ``blocks`` (pinned) to the slices at the byte offsets ``slices``, not before
        ``after``. Nobody waits; the blocks must stay until the last mark."""
        with self._turn:
            offsets = self._copies.upload(slices)
            if after is not None:
                self._spreads.wait(after)
            marks = [
                self._send_one(block, offsets[first : first + self._per_block])
                for block, first in zip(blocks, range(0, len(slices), self._per_block), strict=True)
            ]
            return Sent(marks, offsets)

    def _send_one(self, block: torch.Tensor, offsets: torch.Tensor) -> Mark:
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.spread is not None:
            self._copies.wait(buffer.spread)
        staged = buffer.staged[: len(block)]
        self._copies.copy(staged, block)
        self._spreads.wait(self._copies.mark())
        self._spreads.scatter(self._arena.data, staged, offsets, self._slice_bytes)
        buffer.spread = self._spreads.mark()
        return buffer.spread


class TieredStore:
    """Packed files by way of pinned memory and the ring into an ``arena`` on a device.

    ``host_bytes`` bounds the pinned memory. See :class:`loramux.adapters.packed_files.Store`.
    """

    def __init__(
        self,
        files: PackedFiles,
        arena: Arena,
        device: Device,
        host_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        slice_bytes = arena.frame.slice_bytes
        per_block = max(1, BLOCK_BYTES // slice_bytes)
        block_bytes = per_block * slice_bytes
        self._files = files
        self._device = device
        self._clock = clock
        self._layout = AdapterFormat(arena.frame)
        self.tier = HostTier(device.pinned(host_bytes - host_bytes % block_bytes), block_bytes)
        self.link = Link(clock)
        self._ring = StagingRing(arena, device, per_block)
        self.header = files.header
        self.in_host = self.tier.here
        self.given = device.given
        self.waited_s = device.waited_s

    def warm_up(self) -> None:
        """Compile the kernel. Writes over the pool's first slice: nobody may own it yet."""
        block = torch.zeros(self._layout.frame.slice_bytes, dtype=torch.uint8)
        sent = self._ring.send([block], np.zeros(1, np.int64), None)
        sent.marks[-1].synchronize()

    def begin(
        self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None
    ) -> Arrival | None:
        """See :class:`loramux.adapters.packed_files.Store`."""
        blocks = self.tier.hold(packed.digest)
        if blocks is None:
            return None
        try:
            sent, lands = self._send(packed, blocks, frames, after)
        except Exception as error:
            self.tier.release(packed.digest)
            if is_shortage(error):
                return None  # a loader's thread tries again
            raise
        item = self.tier.block_bytes * packed.num_elems // packed.num_bytes
        return Arrival(
            sent.marks,
            lands,
            np.maximum(packed.layer_ends() - 1, 0) // item,
            hold=self._device.hold,
            done=lambda: self._end(packed, sent),
        )

    def read_into(self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None) -> None:
        """See :class:`loramux.adapters.packed_files.Store`."""
        with self.tier.stream(packed, self._files.read) as blocks:
            began = self._clock()
            sent, _ = self._send(packed, blocks, frames, after)
            sent.marks[-1].synchronize()
            self.link.took(packed.num_bytes, self._clock() - began)

    def _send(
        self,
        packed: PackedAdapter,
        blocks: Sequence[torch.Tensor],
        frames: Sequence[int],
        after: Mark | None,
    ) -> tuple[Sent, npt.NDArray[np.float64]]:
        slices = self._layout.slices(list(frames))
        slices = slices[: packed.num_slices(self._layout.frame.slice_bytes)]
        sent = self._ring.send(blocks, slices, after)
        return sent, self.link.lands([len(block) for block in blocks])

    def _end(self, packed: PackedAdapter, sent: Sent) -> None:
        """Until here the device read the blocks and the offsets, and they had to stay."""
        del sent
        self.tier.release(packed.digest)


class CudaLane:
    """A stream of ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def wait(self, mark: Any) -> None:
        """See :class:`Lane`."""
        self._stream.wait_event(mark)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See :class:`Lane`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def scatter(
        self,
        arena: torch.Tensor,
        staged: torch.Tensor,
        offsets: torch.Tensor,
        slice_bytes: int,
    ) -> None:
        """See :class:`Lane`."""
        with torch.cuda.stream(self._stream):
            scatter(arena, staged, offsets, slice_bytes=slice_bytes)

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """See :class:`Lane`."""
        # From pageable memory: the driver has its own copy of so few bytes when this returns.
        with torch.cuda.stream(self._stream):
            return torch.from_numpy(values).to(self._stream.device, non_blocking=True)

    def mark(self) -> Mark:
        """See :class:`Lane`."""
        mark: Mark = self._stream.record_event()
        return mark


class CudaDevice:
    """See :class:`Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: deque[tuple[Any, Any]] = deque()

    def lane(self) -> Lane:
        """See :class:`Device`."""
        return CudaLane(self._device)

    def given(self) -> Mark:
        """See :class:`Device`."""
        mark: Mark = torch.cuda.current_stream(self._device).record_event()
        return mark

    def hold(self, mark: Any) -> None:
        """See :class:`Device`."""
        stream = torch.cuda.current_stream(self._device)
        make: Any = torch.cuda.Event
        before, after = make(enable_timing=True), make(enable_timing=True)
        before.record(stream)
        stream.wait_event(mark)
        after.record(stream)
        self._waits.append((before, after))

    def waited_s(self) -> float:
        """See :class:`Device`."""
        waited = 0.0
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            waited += before.elapsed_time(after) / 1000
        return waited

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See :class:`Device`."""
        # torch's own pinned memory comes in powers of two: up to twice the budget.
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory
