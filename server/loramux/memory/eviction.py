"""One order of eviction over everything idle: warm adapters and cached prefix pages alike.

GreedyDual-Size (Cao and Irani, USITS 1997) with Frequency (Cherkasova, "Improving WWW Proxies
Performance with Greedy-Dual-Size-Frequency Caching Policy", HPL-98-69R1, 1998): an idle thing is
worth ``clock + uses * cost/size``, where cost is the seconds to bring it back, size its frames and
uses how often it was wanted of late; the least worth goes first and its worth becomes the clock.
Recency, frequency and cost end up in one number, whatever the thing is. Bringing an adapter back
costs the same per byte for all of them, so that without frequency theirs would be the order of last
use, and a thousand adapters used once would push out the one that everybody uses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

HALF_LIFE_USES = 1000.0
"""After so many uses of anything, an earlier use counts half."""
MOST_REMEMBERED = 8192


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

    def worth(self, *, num_frames: int, cost_s: float, uses: float = 1.0) -> float:
        """What such a thing would be worth if it became idle now."""
        return self._clock + uses * cost_s / num_frames

    def offer(
        self,
        key: Hashable,
        *,
        num_frames: int,
        cost_s: float,
        evict: Callable[[], None],
        uses: float = 1.0,
    ) -> None:
        """``key`` became idle; ``evict()`` gives its ``num_frames`` frames back, and may withdraw
        others that are no good without it.

        Of things offered with equal worth the earlier goes first, so a request offers its pages
        from the tail: a page never goes before the pages that only make sense after it.
        """
        self._order += 1
        worth = self.worth(num_frames=num_frames, cost_s=cost_s, uses=uses)
        assert key not in self._idle
        self._idle[key] = _Idle(worth, self._order, num_frames, evict)
        self.num_frames += num_frames
        heapq.heappush(self._heap, (worth, self._order, key))
        if len(self._heap) > 64 + 4 * len(self._idle):
            self._heap = [(i.worth, i.order, k) for k, i in self._idle.items()]
            heapq.heapify(self._heap)

    def withdraw(self, key: Hashable) -> None:
        """``key`` is in use again (or gone by other means)."""
        self.num_frames -= self._idle.pop(key).num_frames

    def evict(self, num_frames: int, below: float = math.inf) -> bool:
        """Evict the least worth until at least ``num_frames`` are given back. False, and nothing
        happens, when that cannot be had of things worth less than ``below``."""
        if num_frames > self.num_frames:
            return False
        chosen: list[tuple[float, int, Hashable]] = []
        gained = 0
        while gained < num_frames:
            entry = worth, order, key = heapq.heappop(self._heap)
            idle = self._idle.get(key)
            if idle is None or idle.order != order:
                continue
            chosen.append(entry)
            if worth >= below:
                for entry in chosen:
                    heapq.heappush(self._heap, entry)
                return False
            gained += idle.num_frames
        for worth, _, key in chosen:
            self._clock = worth
            if key not in self._idle:
                continue  # it went with one before it
            evict = self._idle[key].evict
            self.withdraw(key)
            evict()
        return True


class Frequency:
    """How often each of many things was used, the past counting for less and less.

    Things are remembered whether they are in the pool or not, so that one that comes back is not
    taken for new; of more than ``most`` the least used are forgotten.
    """

    def __init__(self, half_life_uses: float = HALF_LIFE_USES, most: int = MOST_REMEMBERED) -> None:
        self._half_life = half_life_uses
        self._most = most
        self._now = 0
        self._counts: dict[Hashable, tuple[float, int]] = {}

    def use(self, key: Hashable) -> None:
        """``key`` was used once more."""
        self._now += 1
        self._counts[key] = self.of(key) + 1.0, self._now
        if len(self._counts) > self._most:
            ranked = sorted(self._counts, key=self.of)
            for key in ranked[: len(ranked) // 2]:
                del self._counts[key]

    def of(self, key: Hashable) -> float:
        """The uses of ``key``, each worth 2^-(uses of anything since / half-life)."""
        count, at = self._counts.get(key, (0.0, self._now))
        return float(count * 2.0 ** ((at - self._now) / self._half_life))
