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
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.host_tier import HostTier
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.packed_files import Mark, PackedFiles
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat
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

    def mark(self) -> Mark: ...


class Device(Protocol):
    """Where queues come from; memory that its copies are fast from."""

    def lane(self) -> Lane: ...

    def given(self) -> Mark:
        """Everything that was given to the queue that computes until now."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Memory of the host, 1-D uint8."""


@dataclass(slots=True)
class _Buffer:
    staged: torch.Tensor
    offsets: torch.Tensor
    host_offsets: torch.Tensor
    spread: Mark | None = None


class StagingRing:
    """``num_buffers`` buffers of ``slices_per_block`` slices each, on the device of ``arena``."""

    def __init__(
        self, arena: Arena, device: Device, slices_per_block: int, num_buffers: int = RING_BUFFERS
    ) -> None:
        self._arena = arena
        self._slice_bytes = arena.frame.slice_bytes
        self._copies, self._spreads = device.lane(), device.lane()
        where = arena.data.device
        self._buffers = [
            _Buffer(
                torch.empty(slices_per_block * self._slice_bytes, dtype=torch.uint8, device=where),
                torch.empty(slices_per_block, dtype=torch.int64, device=where),
                device.pinned(slices_per_block * 8).view(torch.int64),
            )
            for _ in range(num_buffers)
        ]
        self._next = 0
        self._turn = threading.Lock()

    def wait(self, mark: Mark) -> None:
        """What is sent from now on is spread after ``mark``."""
        self._spreads.wait(mark)

    def send(self, block: torch.Tensor, slices: npt.NDArray[np.int64]) -> Mark:
        """Bring ``block`` (pinned) to the slices at the byte offsets ``slices``; when that is done.

        The calling thread waits while all buffers are full. ``block`` must stay until the mark.
        """
        with self._turn:
            buffer = self._buffers[self._next]
            self._next = (self._next + 1) % len(self._buffers)
            if buffer.spread is not None:
                buffer.spread.synchronize()
            count = len(slices)
            buffer.host_offsets[:count] = torch.from_numpy(slices)
            staged = buffer.staged[: len(block)]
            self._copies.copy(buffer.offsets[:count], buffer.host_offsets[:count])
            self._copies.copy(staged, block)
            self._spreads.wait(self._copies.mark())
            self._spreads.scatter(
                self._arena.data, staged, buffer.offsets[:count], self._slice_bytes
            )
            buffer.spread = self._spreads.mark()
            return buffer.spread


class TieredStore:
    """Packed files by way of pinned memory and the ring into an ``arena`` on a device.

    ``host_bytes`` bounds the pinned memory. See :class:`loramux.adapters.packed_files.Store`.
    """

    def __init__(self, files: PackedFiles, arena: Arena, device: Device, host_bytes: int) -> None:
        slice_bytes = arena.frame.slice_bytes
        self._per_block = max(1, BLOCK_BYTES // slice_bytes)
        block_bytes = self._per_block * slice_bytes
        self._files = files
        self._layout = AdapterFormat(arena.frame)
        self.tier = HostTier(device.pinned(host_bytes - host_bytes % block_bytes), block_bytes)
        self._ring = StagingRing(arena, device, self._per_block)
        self.header = files.header
        self.given = device.given

    def warm_up(self) -> None:
        """Compile the kernel. Writes over the pool's first slice: nobody may own it yet."""
        block = torch.zeros(self._layout.frame.slice_bytes, dtype=torch.uint8)
        self._ring.send(block, np.zeros(1, np.int64)).synchronize()

    def read_into(self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None) -> None:
        """See :class:`loramux.adapters.packed_files.Store`."""
        slices = self._layout.slices(list(frames))
        slices = slices[: packed.num_slices(self._layout.frame.slice_bytes)]
        with self.tier.stream(packed, self._files.read) as blocks:
            if after is not None:
                self._ring.wait(after)
            mark: Mark | None = None
            for index, block in enumerate(blocks):
                first = index * self._per_block
                mark = self._ring.send(block, slices[first : first + self._per_block])
            if mark is not None:
                mark.synchronize()


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

    def mark(self) -> Mark:
        """See :class:`Lane`."""
        mark: Mark = self._stream.record_event()
        return mark


class CudaDevice:
    """See :class:`Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lane(self) -> Lane:
        """See :class:`Device`."""
        return CudaLane(self._device)

    def given(self) -> Mark:
        """See :class:`Device`."""
        mark: Mark = torch.cuda.default_stream(self._device).record_event()
        return mark

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See :class:`Device`."""
        # torch's own pinned memory comes in powers of two: up to twice the budget.
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory
