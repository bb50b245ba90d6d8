"""The checksum of a packed file's payload."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_SECTOR = 4096


class PayloadSum:
    """The payload's checksum: SHA-256 over the 64-bit sums of its sectors of 4096 bytes.

    It finds what disks do: flipped bits, and sectors that are lost, stale or in the wrong place.
    Against a forger it is worth nothing, nor would any sum be that lies beside the data. A load
    waits for it, so it has to keep up with a copy from the page cache (several GB/s a core), which
    SHA-256 of every byte does not do by an order of magnitude on many machines.
    """

    def __init__(self) -> None:
        self._sums = hashlib.sha256()
        self._rest = b""

    def update(self, data: memoryview) -> None:
        """The next bytes of the payload, as few or many as are at hand."""
        if self._rest:
            missing = _SECTOR - len(self._rest)
            self._rest += data[:missing]
            data = data[missing:]
            if len(self._rest) < _SECTOR:
                return
            self._sums.update(_sector_sums(self._rest))
        whole = len(data) - len(data) % _SECTOR
        self._sums.update(_sector_sums(data[:whole]))
        self._rest = bytes(data[whole:])

    def hexdigest(self) -> str:
        """The sum of everything up to here, and the end: 64 hexadecimal digits."""
        whole = self._sums.copy()
        whole.update(_sector_sums(self._rest.ljust(_SECTOR, b"\x00")))
        return whole.hexdigest()


def _sector_sums(sectors: bytes | memoryview) -> bytes:
    words = np.frombuffer(sectors, "<u8").reshape(-1, _SECTOR // 8)
    sums: npt.NDArray[np.uint64] = np.add.reduce(words, axis=1, dtype=np.uint64).astype("<u8")
    return sums.tobytes()
