"""What a draft model has of requests: KV that lags behind and gives way to anything else.

It is asked for in some steps only, so it catches up when it is; guesses that came true are kept,
others are computed over. Between steps each request's pages are one idle thing in the pool's order
of eviction, and cheap: losing them costs guesses, never tokens.
"""

from __future__ import annotations

from loramux.memory.formats import KvFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.request import Adapters, Kv, Request

SHARE_OF_A_PREFIX_PAGE = 0.1
"""What a draft's page costs to compute again, of what a cached page of the target does."""


class Follower:
    """A draft model's ``kv`` of ``request``, which counts known ids only: behind it stands the KV
    of the guesses ``ahead``, good as far as they come true."""

    __slots__ = ("ahead", "kv", "request")

    def __init__(self, request: Request, kv: Kv) -> None:
        self.request = request
        self.kv = kv
        self.ahead: list[int] = []

    @property
    def lag(self) -> int:
        """Known ids whose KV it has not."""
        return self.request.num_ids - self.kv.num_computed

    def catch(self) -> None:
        """Keep the guesses that came true; the last known id is always computed again, what
        comes after it being wanted."""
        kv, last = self.kv, self.request.num_ids - 1
        for guess in self.ahead:
            if kv.num_computed >= last or guess != self.request.ids[kv.num_computed]:
                break
            kv.num_computed += 1
        kv.num_computed = min(kv.num_computed, last)
        self.ahead = []

    def forget(self) -> list[int]:
        """Start again from nothing; the frames it had."""
        self.ahead = []
        return self.kv.take_frames()


class Followers:
    """The followers of one draft model, whose KV is of ``layout``, by request."""

    def __init__(self, layout: KvFormat, pool: Pool) -> None:
        self._layout = layout
        self._pool = pool
        self._followers: dict[Request, Follower] = {}
        self._page_cost_s = pool.prefix.page_cost_s * SHARE_OF_A_PREFIX_PAGE

    def __contains__(self, request: Request) -> bool:
        return request in self._followers

    def wake(self, request: Request, adapters: Adapters) -> Follower:
        """The follower of ``request``, as far as it still is right when it wears ``adapters``. It
        keeps its frames until it may ``rest``."""
        follower = self._followers.get(request)
        if follower is None:
            kv = Kv(self._layout.model_id)
            kv.reserve(self._layout.num_pages(request.max_ids))
            follower = self._followers[request] = Follower(request, kv)
        if follower in self._pool.order:
            self._pool.order.withdraw(follower)
        if follower.kv.adapters != adapters:
            self._pool.frames.give_back(follower.forget(), Owner.KV)
            follower.kv.adapters = adapters
        follower.catch()
        return follower

    def grow(self, follower: Follower, num_ids: int) -> bool:
        """Frames for the first ``num_ids`` ids; False if only better things could make room."""
        kv = follower.kv
        need = self._layout.num_pages(num_ids) - kv.num_pages
        if need <= 0:
            return True
        below = self._pool.order.worth(num_frames=1, cost_s=self._page_cost_s)
        frames = self._pool.obtain(need, Owner.KV, below)
        if frames is None:
            return False
        kv.add_frames(frames)
        return True

    def rest(self, follower: Follower) -> None:
        """Whoever needs its frames may have them."""
        kv, known = follower.kv, follower.request.num_ids
        if kv.num_computed > known:
            follower.ahead = follower.request.ids[known : kv.num_computed].tolist()
            kv.num_computed = known
        if kv.num_pages:
            self._pool.order.offer(
                follower,
                num_frames=kv.num_pages,
                cost_s=kv.num_pages * self._page_cost_s,
                evict=lambda: self._pool.frames.give_back(follower.forget(), Owner.KV),
            )

    def ended(self, request: Request) -> None:
        """Nothing is kept of ``request``, if anything was."""
        follower = self._followers.pop(request, None)
        if follower is not None and follower in self._pool.order:
            self._pool.order.withdraw(follower)
            self._pool.frames.give_back(follower.forget(), Owner.KV)
