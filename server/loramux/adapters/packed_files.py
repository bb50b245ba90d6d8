"""Packed adapters on disk -> memory of the host, read straight into place."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loramux.adapters.arrivals import Arrival, Mark
from loramux.adapters.pack import PackedAdapter, packed_path, read_header
from loramux.adapters.payload_sum import PayloadSum
from loramux.errors import AdapterLoadFailed
from loramux.memory.arena import Arena

MOST_HEADERS = 4096
"""Headers kept in memory, about 5 KB each; those not asked for longest are read again."""
IOV_MAX = os.sysconf("SC_IOV_MAX")


class Store(Protocol):
    """Where packed adapters come from, and how they get into the pool."""

    def given(self) -> Mark | None:
        """Everything the device was given to compute until now; None: it is done."""

    def begin(
        self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None
    ) -> Arrival | None:
        """Like ``read_into``, but without waiting, for a stream that is so near that nothing can
        fail any more; None for others."""

    def waited_s(self) -> float:
        """Seconds the device stood still for arrivals since the last call, as far as known."""

    def in_host(self) -> Mapping[str, int]:
        """Digests in memory on the way to a device, longest unused first, and their bytes."""

    def header(self, digest: str) -> PackedAdapter:
        """What the packed file holds. Raises LoramuxError if it is not there or not ours."""

    def read_into(self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None) -> None:
        """Copy the stream into ``frames``, in order; on a loader's thread. Before ``after`` they
        may still be somebody else's. Raises LoramuxError or OSError."""


@dataclass
class _Known:
    """``verified``: inode and time of the file whose payload had the right sum."""

    packed: PackedAdapter
    verified: tuple[int, int] | None = None
    suspect: bool = False


class PackedFiles:
    """The packed files under ``data_dir`` that belong to the base ``fingerprint``."""

    def __init__(self, data_dir: Path, fingerprint: str) -> None:
        self._data_dir = data_dir
        self._fingerprint = fingerprint
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def header(self, digest: str) -> PackedAdapter:
        """What the packed file of ``digest`` holds. Raises LoramuxError if it is not usable."""
        known = self._known.get(digest)
        if known is None or known.suspect:
            path = packed_path(self._data_dir, digest, self._fingerprint)
            try:
                packed = read_header(path)
            except OSError as error:
                raise AdapterLoadFailed("the adapter's packed file is missing") from error
            if packed.digest != digest:
                raise AdapterLoadFailed("the adapter's packed file holds another adapter")
            known = self._known[digest] = _Known(packed)
            if len(self._known) > MOST_HEADERS:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        return known.packed

    def read(self, packed: PackedAdapter, views: Sequence[memoryview]) -> None:
        """Read the stream into ``views``, one after the other, from any thread.

        The payload is summed the first time this process reads this very file. Raises OSError, and
        AdapterLoadFailed when the file is cut short or damaged; its header is read anew then.
        """
        known = self._known.get(packed.digest) or _Known(packed)
        try:
            self._read(known, packed, views)
        except BaseException:
            known.suspect = True
            raise

    @staticmethod
    def _read(known: _Known, packed: PackedAdapter, views: Sequence[memoryview]) -> None:
        file = os.open(packed.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            stamp = status.st_ino, status.st_mtime_ns
            if known.verified == stamp:
                read_scattered(file, views, packed.payload_offset)
                return
            payload_sum = PayloadSum()
            offset = packed.payload_offset
            for view in views:
                # View by view, so that the sum finds the bytes in the processor's cache.
                read_scattered(file, [view], offset)
                payload_sum.update(view)
                offset += len(view)
        finally:
            os.close(file)
        if payload_sum.hexdigest() != packed.payload_sum:
            raise AdapterLoadFailed(
                "the adapter's packed file is damaged: its checksum does not match"
            )
        known.verified = stamp


class FrameStore:
    """Packed files read straight into the frames of an ``arena`` in the host's memory."""

    def __init__(self, files: PackedFiles, arena: Arena) -> None:
        self._files = files
        self._arena = arena
        self.header = files.header

    def given(self) -> None:
        """See :class:`Store`: on a CPU a step is over when it returns."""

    def begin(self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None) -> None:
        """See :class:`Store`: whatever copies on a CPU is not there to compute."""

    def waited_s(self) -> float:
        """See :class:`Store`."""
        return 0.0

    def in_host(self) -> Mapping[str, int]:
        """See :class:`Store`: there is nothing between."""
        return {}

    def read_into(self, packed: PackedAdapter, frames: Sequence[int], after: Mark | None) -> None:
        """See :class:`Store`."""
        self._files.read(packed, self._arena.views(frames, packed.num_bytes))


def read_scattered(file: int, views: Sequence[memoryview], offset: int) -> None:
    """Fill ``views`` with the bytes of ``file`` from ``offset`` on, in as few calls as the system
    takes them; the interpreter's lock is free meanwhile. Raises AdapterLoadFailed at an early end
    of the file."""
    left = list(views)
    first = 0
    while first < len(left):
        got = os.preadv(file, left[first : first + IOV_MAX], offset)
        if got == 0:
            raise AdapterLoadFailed("the adapter's packed file is shorter than its header says")
        offset += got
        while first < len(left) and got >= len(left[first]):
            got -= len(left[first])
            first += 1
        if got:
            left[first] = left[first][got:]
