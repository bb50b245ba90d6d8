"""One order of eviction over everything idle: warm adapters and cached prefix pages alike.

GreedyDual-Size (Cao and Irani, USITS 1997): an idle thing is worth ``clock + cost/size``, where
cost is the seconds to bring it back and size its frames; the least worth goes first and its worth
becomes the clock. Recency and cost end up in one number, whatever the thing is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import NamedTuple


class _Idle(NamedTuple):
    worth: float
    order: int
    num_frames: int
    evict: Callable[[], None]


class EvictionOrder:
    """Idle things that hold frames. ``num_frames`` is what evicting all of them would free."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._clock = 0.0
        self._order = 0
        self._idle: dict[Hashable, _Idle] = {}
        self._heap: list[tuple[float, int, Hashable]] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self._idle

    def offer(
        self, key: Hashable, *, num_frames: int, cost_s: float, evict: Callable[[], None]
    ) -> None:
        """``key`` became idle; ``evict()`` gives its ``num_frames`` frames back.

        Of things offered with equal worth the earlier goes first, so a request offers its pages
        from the tail: a page never goes before the pages that only make sense after it.
        """
        self._order += 1
        idle = _Idle(self._clock + cost_s / num_frames, self._order, num_frames, evict)
        assert key not in self._idle
        self._idle[key] = idle
        self.num_frames += num_frames
        heapq.heappush(self._heap, (idle.worth, idle.order, key))
        if len(self._heap) > 64 + 4 * len(self._idle):
            self._heap = [(i.worth, i.order, k) for k, i in self._idle.items()]
            heapq.heapify(self._heap)

    def withdraw(self, key: Hashable) -> None:
        """``key`` is in use again (or gone by other means)."""
        self.num_frames -= self._idle.pop(key).num_frames

    def evict_one(self) -> bool:
        """Evict the least worth; False when nothing is idle."""
        while self._heap:
            worth, order, key = heapq.heappop(self._heap)
            idle = self._idle.get(key)
            if idle is None or idle.order != order:
                continue
            self._clock = worth
            self.withdraw(key)
            idle.evict()
            return True
        return False
