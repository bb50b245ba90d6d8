"""Whose request is next: the adapter served least so far (Virtual Token Counters).

VTC (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588): each (tenant,
adapter list) counts the tokens it was served, an output token for two; the waiting one with the
least count goes first; one that comes back from idleness starts at the least active count, so
nobody saves up credit by staying away. Tokens of a tenant with many adapters count for more:
tenants share first, and their adapters what they have.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Generator, Iterable

from loramux.request import Adapters, Request

INPUT_COST = 1
OUTPUT_COST = 2
Key = tuple[str, Adapters]
"""Request.fair_key: a tenant and its adapter list."""


class FairOrder:
    """The waiting requests, first come first served within a key, fair between keys.

    ``version`` changes whenever ``digests()`` does. Looking at the head costs the logarithm of the
    number of waiting keys, and walking on as much for every request walked over. Tenants that are
    held back by a limit of their own are left out, and cost nothing.
    """

    def __init__(self) -> None:
        self.served: dict[Key, float] = {}
        self.version = 0
        self._waiting: dict[Key, deque[Request]] = {}
        self._active: dict[Key, int] = {}
        self._num_keys: Counter[str] = Counter()  # of those, by tenant
        self._num_waiting = 0
        # A waiting key has one entry (served once, its number in _turn, key). Counters only rise,
        # so an entry that is out of date comes up too early, never too late.
        self._heap: list[tuple[float, int, Key]] = []
        self._turn: dict[Key, int] = {}
        self._turns = 0
        self._held_back: dict[str, list[tuple[float, int, Key]]] = {}  # with what left the heap

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, request: Request) -> None:
        """A new request waits at the end of its key's line."""
        key = request.fair_key
        if key not in self._active:
            self.served[key] = max(self.served.get(key, 0.0), self._floor())
            self._active[key] = 0
            self._num_keys[key[0]] += 1
        self._active[key] += 1
        self._line(key).append(request)
        self._num_waiting += 1

    def push_back(self, request: Request) -> None:
        """A preempted request goes to the front of its line; its key never stopped being active."""
        self._line(request.fair_key).appendleft(request)
        self._num_waiting += 1

    def _line(self, key: Key) -> deque[Request]:
        line = self._waiting.get(key)
        if line is None:
            line = self._waiting[key] = deque()
            self._turns += 1
            self._turn[key] = self._turns
            heapq.heappush(self._heap, (self.served[key], self._turns, key))
            self.version += 1
        return line

    def _settle_top(self) -> Key | None:
        """Bring the key that is next to the top of the heap; None when nobody waits."""
        while self._heap:
            served, turn, key = self._heap[0]
            if self._turn.get(key) != turn:
                heapq.heappop(self._heap)
            elif key[0] in self._held_back:
                self._held_back[key[0]].append(heapq.heappop(self._heap))
            elif served < self.served[key]:
                heapq.heapreplace(self._heap, (self.served[key], turn, key))
            else:
                return key
        return None

    def head(self) -> Request | None:
        """The first request of the least served key, if any waits."""
        key = self._settle_top()
        return None if key is None else self._waiting[key][0]

    def walk(self) -> Generator[Request]:
        """Waiting requests in fair order, to be admitted or not. To be closed when the caller is
        done; until then nobody else asks for the order.

        When the caller removes the one just yielded, its key comes again with what admitting it
        will cost; otherwise the rest of its line waits behind it.
        """
        again: list[tuple[float, int, Key]] = []
        seen: dict[Key, int] = {}
        try:
            while True:
                key = self._settle_top()
                if again and (key is None or again[0] < self._heap[0]):
                    served, turn, key = heapq.heappop(again)
                    if key[0] in self._held_back:
                        continue
                elif key is not None:
                    served, turn, key = heapq.heappop(self._heap)
                    seen[key] = turn
                else:
                    return
                request = self._waiting[key][0]
                yield request
                line = self._waiting.get(key)
                if line and line[0] is not request:
                    cost = self._cost(request, request.num_prompt)
                    heapq.heappush(again, (served + cost, turn, key))
        finally:
            for key, turn in seen.items():
                if self._turn.get(key) == turn:
                    heapq.heappush(self._heap, (self.served[key], turn, key))

    def hold_back(self, tenant: str) -> None:
        """None of the tenant's is looked at until it is let go."""
        self._held_back.setdefault(tenant, [])

    def is_held_back(self, tenant: str) -> bool:
        """See ``hold_back``."""
        return tenant in self._held_back

    def let_go(self, tenant: str) -> None:
        """If the tenant was held back it is no more, and has saved up no credit meanwhile: its
        counts rise together until the least of them is that of the others."""
        if (entries := self._held_back.pop(tenant, None)) is None:
            return
        own = [key for key in self._active if key[0] == tenant]
        if own:
            rise = self._floor(without=tenant) - min(self.served[key] for key in own)
            for key in own:
                self.served[key] += max(0.0, rise)
        for entry in entries:
            heapq.heappush(self._heap, entry)

    def _floor(self, without: str | None = None) -> float:
        """The least count of those that are served as it is their turn; 0 if there are none."""
        active = [key for key in self._active if key[0] != without]
        free = [key for key in active if key[0] not in self._held_back]
        return min((self.served[key] for key in free or active), default=0.0)

    def oldest_arrival(self) -> float | None:
        """When the one arrived that has waited longest for its first step; None if nobody does."""
        firsts = (
            next((r.arrival for r in line if r.first_scheduled is None), None)
            for line in self._waiting.values()
        )
        return min((first for first in firsts if first is not None), default=None)

    def lines(self) -> Iterable[deque[Request]]:
        """The waiting requests of each key."""
        return self._waiting.values()

    def digests(self) -> list[str]:
        """Adapters that waiting requests need."""
        refs = (ref for line in self._waiting.values() for ref in line[0].adapters)
        return list(dict.fromkeys(ref.digest for ref in refs))

    def remove(self, request: Request) -> None:
        """``request`` stops waiting: it was admitted, or is done."""
        key = request.fair_key
        line = self._waiting[key]
        line.remove(request)
        if not line:
            del self._waiting[key], self._turn[key]
            self.version += 1
            self._forget_stale()
        self._num_waiting -= 1

    def _forget_stale(self) -> None:
        if len(self._heap) > 64 + 4 * len(self._waiting):
            self._heap = [entry for entry in self._heap if self._turn.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def charge(self, request: Request, *, inputs: int, outputs: int) -> None:
        """``request`` was served so many tokens."""
        key = request.fair_key
        self.served[key] += self._weight(key) * (INPUT_COST * inputs + OUTPUT_COST * outputs)

    def debt(self, giver: Request, taker: Request) -> float:
        """How much more the key of ``giver``, which runs, has had than that of ``taker``, beyond
        what it costs to give its seat away: the prompt of the one, and the other's computed again.
        """
        costs = self._cost(taker, taker.num_pending) + self._cost(giver, giver.num_ids)
        return self.served[giver.fair_key] - self.served[taker.fair_key] - costs

    def _cost(self, request: Request, num_inputs: int) -> float:
        return self._weight(request.fair_key) * INPUT_COST * num_inputs

    def _weight(self, key: Key) -> float:
        """One, unless the tenant has more active keys than tenants have on average."""
        return self._num_keys[key[0]] * len(self._num_keys) / len(self._active)

    def done(self, request: Request) -> None:
        """``request`` ended; a key with none left becomes idle."""
        key = request.fair_key
        self._active[key] -= 1
        if self._active[key] == 0:
            del self._active[key]
            self._num_keys[key[0]] -= 1
            if not self._num_keys[key[0]]:
                del self._num_keys[key[0]]
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
