"""The one pool: frames, what may be evicted to free them, and the prefix cache on top."""

from __future__ import annotations

import math
from collections.abc import Callable

from loramux.memory.eviction import EvictionOrder
from loramux.memory.frames import FramePool, Owner
from loramux.memory.prefix import PrefixIndex


class Pool:
    """Frames with eviction: ``obtain`` frees idle things, in the one order, when frames run out."""

    def __init__(self, num_frames: int, on_free: Callable[[list[int]], None] | None = None) -> None:
        self.frames = FramePool(num_frames, on_free)
        self.order = EvictionOrder()
        self.prefix = PrefixIndex(self.frames, self.order)
        self.wanted_for_kv = False

    @property
    def num_available(self) -> int:
        """Frames that are free or can be freed without touching anything in use."""
        return self.frames.num_free + self.order.num_frames

    def obtain(self, num: int, owner: Owner, below: float = math.inf) -> list[int] | None:
        """``num`` frames for ``owner``, evicting idle things worth less than ``below`` if needed;
        None, and nothing is evicted, if that cannot do."""
        missing = num - self.frames.num_free
        self.wanted_for_kv = owner is Owner.KV  # what is evicted may ask whom it gave way to
        if missing > 0 and not self.order.evict(missing, below):
            return None
        return self.frames.take(num, owner)

    def check(self) -> None:
        """The books balance; an error here is a bug of ours."""
        self.frames.check()
        self.prefix.check()
