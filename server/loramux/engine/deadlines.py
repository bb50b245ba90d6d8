"""Whose time is over, and whose first token would come too late."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from loramux.request import Request, Status

NEWEST = 0.125
"""The weight of the newest step in how long one takes."""


class Deadlines:
    """Of the requests of one engine, which computes ``max_batch_tokens`` in a step. With ``slo_s``
    first tokens have so long to come; ``num_cached`` says how many of a request's are cached now,
    and takes long enough to be asked only where it matters."""

    def __init__(
        self, slo_s: float | None, max_batch_tokens: int, num_cached: Callable[[Request], int]
    ) -> None:
        self.step_s = 0.0
        """About how long a step takes now."""
        self._slo_s = slo_s
        self._max_batch_tokens = max_batch_tokens
        self._num_cached = num_cached
        self._timed: set[Request] = set()
        self._tolerant: list[tuple[float, int, Request]] = []  # until when they may wait
        self._serial = 0

    def add(self, request: Request) -> None:
        """A new one waits."""
        if request.deadline is not None:
            self._timed.add(request)
        if self._slo_s is not None and request.num_outputs == 0:
            self._tolerate(request, self._begins_by(request, self._slo_s, 0))

    def done(self, request: Request) -> None:
        """It is over."""
        self._timed.discard(request)

    def took(self, seconds: float) -> None:
        """A step is done."""
        self.step_s += (NEWEST if self.step_s else 1.0) * (seconds - self.step_s)

    def rest(self) -> None:
        """Nothing runs: how long steps took says no more of the next one."""
        self.step_s = 0.0

    def expired(self, now: float) -> Iterable[Request]:
        """Requests whose deadline has passed."""
        return [r for r in self._timed if r.deadline is not None and r.deadline < now]

    def late(self, now: float) -> Iterable[Request]:
        """Waiting requests whose first token would come too late if they began now. Whoever has
        begun may end."""
        found = []
        while self._slo_s is not None and self._tolerant and self._tolerant[0][0] < now:
            request = heapq.heappop(self._tolerant)[2]
            if request.status is Status.WAITING and request.first_scheduled is None:
                until = self._begins_by(request, self._slo_s, self._num_cached(request))
                if until < now:
                    found.append(request)
                else:
                    self._tolerate(request, until)
        return found

    def _begins_by(self, request: Request, slo_s: float, num_cached: int) -> float:
        steps = -(-(request.num_pending - num_cached) // self._max_batch_tokens)
        return request.arrival + slo_s - steps * self.step_s

    def _tolerate(self, request: Request, until: float) -> None:
        self._serial += 1
        heapq.heappush(self._tolerant, (until, self._serial, request))
