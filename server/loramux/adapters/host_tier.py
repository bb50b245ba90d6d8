"""Packed streams in pinned memory of the host, between the disk and a device.

A device copies from pinned memory at the full rate of its link and beside everything else, from any
other at a fraction of it. The memory is cut into equal blocks, so that nothing fragments; a stream
takes whole blocks, and the one used longest ago gives way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loramux.adapters.pack import PackedAdapter
from loramux.errors import AdapterLoadFailed


@dataclass(slots=True)
class _Stream:
    blocks: list[int]
    num_bytes: int
    users: int = 1
    here: bool = False


class HostTier:
    """Streams by digest in ``memory``, 1-D uint8, cut into blocks of ``block_bytes``. For any
    number of threads, of which no two ask for the same stream at a time."""

    def __init__(self, memory: torch.Tensor, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.num_blocks = memory.numel() // block_bytes
        self._memory = memory
        self._bytes = memoryview(memory.numpy().data)
        self._free = list(range(self.num_blocks))
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._changed = threading.Condition()

    @contextmanager
    def stream(
        self, packed: PackedAdapter, read: Callable[[PackedAdapter, Sequence[memoryview]], None]
    ) -> Iterator[list[torch.Tensor]]:
        """The stream's bytes, block by block, there until the end of the block of code; ``read``
        brings them when they are not here. Waits for others to end when they use all there is.

        Raises what ``read`` raises, and AdapterLoadFailed for one larger than the whole tier.
        """
        blocks = self.hold(packed.digest)
        if blocks is None:
            blocks = self._bring(packed, read)
        try:
            yield blocks
        finally:
            self.release(packed.digest)

    def here(self) -> dict[str, int]:
        """Digests that are here, longest unused first, and their bytes."""
        with self._changed:
            return {d: stream.num_bytes for d, stream in self._streams.items() if stream.here}

    def hold(self, digest: str) -> list[torch.Tensor] | None:
        """The blocks of a stream that is here, there until ``release``; None if it is not."""
        with self._changed:
            stream = self._streams.get(digest)
            if stream is None or not stream.here:
                return None
            stream.users += 1
            self._streams.move_to_end(digest)
            return [self._memory[place] for place in self._places(stream)]

    def release(self, digest: str) -> None:
        """The end of a ``hold``."""
        with self._changed:
            self._streams[digest].users -= 1
            self._changed.notify_all()

    def _bring(
        self, packed: PackedAdapter, read: Callable[[PackedAdapter, Sequence[memoryview]], None]
    ) -> list[torch.Tensor]:
        with self._changed:
            stream = self._streams[packed.digest] = self._take(packed)
        try:
            read(packed, [self._bytes[place] for place in self._places(stream)])
        except BaseException:
            with self._changed:
                self._free += self._streams.pop(packed.digest).blocks
                self._changed.notify_all()
            raise
        stream.here = True
        return [self._memory[place] for place in self._places(stream)]

    def _take(self, packed: PackedAdapter) -> _Stream:
        need = -(-packed.num_bytes // self.block_bytes)
        if need > self.num_blocks:
            raise AdapterLoadFailed(
                f"the adapter's {packed.num_bytes} bytes are more than the "
                f"{self.num_blocks * self.block_bytes} of --host-memory"
            )
        while len(self._free) < need:
            idle = next((d for d, stream in self._streams.items() if not stream.users), None)
            if idle is None:
                self._changed.wait()
            else:
                self._free += self._streams.pop(idle).blocks
        taken = [self._free.pop() for _ in range(need)]
        return _Stream(taken, packed.num_bytes)

    def _places(self, stream: _Stream) -> list[slice]:
        size = self.block_bytes
        left = [stream.num_bytes - index * size for index in range(len(stream.blocks))]
        return [
            slice(block * size, block * size + min(size, rest))
            for block, rest in zip(stream.blocks, left, strict=True)
        ]
