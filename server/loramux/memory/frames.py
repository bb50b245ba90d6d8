"""Who owns which frame of the pool: integers only, no bytes.

    free ──take──> kv ──(page full, hashed)──> prefix ──┐
     ^  └──take──> loading ──(read)──> adapter ────────┤
     └───────────────────give_back──────────────────────┘

Running out is a return value (None), never an exception: the scheduler decides what gives way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum


class Owner(IntEnum):
    """Who a frame belongs to. KV frames are exclusive to one request, PREFIX frames are shared."""

    FREE = 0
    KV = 1
    PREFIX = 2
    ADAPTER = 3
    LOADING = 4


class FramePool:
    """The frames of the arena and their owners.

    ``on_free`` is told which frames were given back, before anyone can take them again.
    """

    def __init__(self, num_frames: int, on_free: Callable[[list[int]], None] | None = None) -> None:
        self.num_frames = num_frames
        self._owner = [Owner.FREE] * num_frames
        self._free = list(range(num_frames - 1, -1, -1))
        self._count = [num_frames, 0, 0, 0, 0]
        self._on_free = on_free

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, owner: Owner) -> int:
        """How many frames ``owner`` has."""
        return self._count[owner]

    def owner(self, frame: int) -> Owner:
        """Whose ``frame`` is."""
        return self._owner[frame]

    def owners(self) -> bytes:
        """The owner of every frame, a byte each."""
        return bytes(self._owner)

    def take(self, num: int, owner: Owner) -> list[int] | None:
        """``num`` free frames for ``owner``, or None (and nothing changes) if there are fewer."""
        if num > len(self._free):
            return None
        if num == 0:
            return []
        frames = self._free[-num:]
        del self._free[-num:]
        self._assign(frames, Owner.FREE, owner)
        return frames

    def transfer(self, frames: Iterable[int], old: Owner, new: Owner) -> None:
        """Hand ``frames`` from ``old`` to ``new`` without freeing them."""
        self._assign(frames, old, new)

    def give_back(self, frames: list[int], owner: Owner) -> None:
        """Return ``frames`` of ``owner`` to the free list."""
        self._assign(frames, owner, Owner.FREE)
        if self._on_free is not None and frames:
            self._on_free(frames)
        self._free.extend(frames)

    def _assign(self, frames: Iterable[int], old: Owner, new: Owner) -> None:
        moved = 0
        for frame in frames:
            assert self._owner[frame] is old, (frame, self._owner[frame], old)
            self._owner[frame] = new
            moved += 1
        self._count[old] -= moved
        self._count[new] += moved

    def check(self) -> None:
        """Recount everything; an error here is a bug of ours."""
        assert len(set(self._free)) == len(self._free)
        assert all(self._owner[frame] is Owner.FREE for frame in self._free)
        for owner in Owner:
            assert self._count[owner] == sum(o is owner for o in self._owner), owner
        assert self._count[Owner.FREE] == len(self._free)
        assert sum(self._count) == self.num_frames
