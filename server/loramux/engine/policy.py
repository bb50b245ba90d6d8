"""Whose request is next: the adapter served least so far (Virtual Token Counters).

VTC (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588): each (tenant,
adapter list) counts the tokens it was served, an output token for two; the waiting one with the
least count goes first; one that comes back from idleness starts at the least active count, so
nobody saves up credit by staying away.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator

from loramux.request import Request

INPUT_COST = 1
OUTPUT_COST = 2


class FairOrder:
    """The waiting requests, first come first served within a key, fair between keys."""

    def __init__(self) -> None:
        self.served: dict[Hashable, float] = {}
        self._waiting: dict[Hashable, deque[Request]] = {}
        self._active: dict[Hashable, int] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, request: Request) -> None:
        """A new request waits at the end of its key's line."""
        key = request.fair_key
        if key not in self._active:
            floor = min((self.served[k] for k in self._active), default=0.0)
            self.served[key] = max(self.served.get(key, 0.0), floor)
            self._active[key] = 0
        self._active[key] += 1
        self._waiting.setdefault(key, deque()).append(request)
        self._num_waiting += 1

    def push_back(self, request: Request) -> None:
        """A preempted request goes to the front of its line; its key never stopped being active."""
        self._waiting.setdefault(request.fair_key, deque()).appendleft(request)
        self._num_waiting += 1

    def head(self) -> Request | None:
        """The first request of the least served key, if any waits."""
        key = min(self._waiting, key=lambda key: self.served[key], default=None)
        return None if key is None else self._waiting[key][0]

    def walk(self) -> Iterator[Request]:
        """Waiting requests in fair order, to be admitted or not.

        When the caller removes the one just yielded, its key comes again with what admitting it
        will cost; otherwise the rest of its line waits behind it.
        """
        heap = [(self.served[key], order, key) for order, key in enumerate(self._waiting)]
        heapq.heapify(heap)
        while heap:
            served, order, key = heapq.heappop(heap)
            request = self._waiting[key][0]
            yield request
            line = self._waiting.get(key)
            if line and line[0] is not request:
                heapq.heappush(heap, (served + INPUT_COST * request.num_prompt, order, key))

    def digests(self) -> list[str]:
        """Adapters that waiting requests need."""
        refs = (ref for line in self._waiting.values() for ref in line[0].adapters)
        return list(dict.fromkeys(ref.digest for ref in refs))

    def remove(self, request: Request) -> None:
        """``request`` stops waiting: it was admitted, or is done."""
        line = self._waiting[request.fair_key]
        line.remove(request)
        if not line:
            del self._waiting[request.fair_key]
        self._num_waiting -= 1

    def charge(self, request: Request, *, inputs: int, outputs: int) -> None:
        """``request`` was served so many tokens."""
        self.served[request.fair_key] += INPUT_COST * inputs + OUTPUT_COST * outputs

    def done(self, request: Request) -> None:
        """``request`` ended; a key with none left becomes idle."""
        key = request.fair_key
        self._active[key] -= 1
        if self._active[key] == 0:
            del self._active[key]
            self._forget_idle()

    def _forget_idle(self) -> None:
        # A counter at or below every active one gives its key nothing on return: drop it, or the
        # table would grow by one entry for every adapter ever served.
        floor = min((self.served[k] for k in self._active), default=None)
        if floor is None:
            self.served.clear()
        elif len(self.served) > 2 * len(self._active) + 64:
            idle = [k for k, v in self.served.items() if k not in self._active and v <= floor]
            for key in idle:
                del self.served[key]
