"""Which requests an engine is computing now, where whoever starts the next engine can read it.

A file that both processes have mapped: what was written to it is there however the engine ended,
and writing costs no system call.

    byte 0      0: nobody, or it was just being written   1: the ids below
    bytes 1-4   how many bytes of ids there are
    from 5 on   request ids, a line each
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

_LENGTH = struct.Struct("<I")
_BODY = 1 + _LENGTH.size
ID_BYTES = 64
"""Room for each request id; they are the server's own and shorter."""


class BlackBox:
    """The engine's side of ``path``, with room for ``num_ids`` request ids."""

    def __init__(self, path: Path, num_ids: int) -> None:
        size = _BODY + num_ids * ID_BYTES
        with path.open("x+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)

    def note(self, request_ids: Sequence[str]) -> None:
        """These are being computed from now on. With more of them than there is room for nobody is
        named, as when the engine does what concerns no request in particular."""
        self._map[0] = 0
        if not request_ids:
            return
        ids = "\n".join(request_ids).encode()
        if len(ids) > len(self._map) - _BODY:
            return
        _LENGTH.pack_into(self._map, 1, len(ids))
        self._map[_BODY : _BODY + len(ids)] = ids
        self._map[0] = 1


def read(path: Path) -> list[str]:
    """Whom the engine that wrote ``path`` was computing last; nobody if it never came so far."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    if len(data) < _BODY or not data[0]:
        return []
    (length,) = _LENGTH.unpack_from(data, 1)
    return data[_BODY : _BODY + length].decode(errors="replace").split("\n")
