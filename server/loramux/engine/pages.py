"""The pages of requests: had from the pool, found in the prefix cache, counted for each tenant.

A tenant may have a share of the pool (``Request.pool_share``): so many frames are the KV of its
running requests at most. A page that several of them run on counts once, one that nobody runs on
does not. Whatever the share, one request alone gets what it needs, so that it comes to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from loramux.engine.served import Served
from loramux.errors import RequestTooLarge
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.memory.prefix import page_key, root_key
from loramux.request import Kv, Request
from loramux.wire import frames_of


class Pages:
    """The pages of ``models`` in ``pool``. ``caching``: full ones are kept for others to find."""

    def __init__(self, pool: Pool, models: Mapping[int, Served], *, caching: bool) -> None:
        self._pool = pool
        self._models = models
        self._caching = caching
        self._held: Counter[str] = Counter()
        self._most: dict[str, int] = {}

    # -- a tenant's share ------------------------------------------------------------------------

    def check_share(self, request: Request) -> int:
        """How many frames ``request`` takes in the end. Raises RequestTooLarge when its tenant may
        not hold as many."""
        need = sum(self._models[kv.model_id].kv.num_pages(request.max_ids) for kv in request.kvs)
        most = self._share(request)
        if most is not None and need > most:
            raise RequestTooLarge(
                f"the request needs {need} frames of the memory pool, of which this tenant may "
                f"hold {most}: lower max_tokens"
            )
        return need

    def share_out(self, request: Request) -> bool:
        """From now on its tenant's share is what came with ``request``; whether that is news."""
        before, most = self._most.pop(request.tenant, None), self._share(request)
        if most is not None:
            self._most[request.tenant] = most
        return before != most

    def _share(self, request: Request) -> int | None:
        if request.pool_share is None:
            return None
        return frames_of(request.pool_share, self._pool.frames.num_frames)

    def is_limited(self, request: Request) -> bool:
        """Whether its tenant has a share."""
        return request.tenant in self._most

    def held(self, tenant: str) -> int:
        """Frames that its requests have."""
        return self._held[tenant]

    def exceed_share(self, request: Request, num_tokens: int, *, spare: int = 0) -> bool:
        """Whether the pages of so many more tokens, and ``spare`` others, are more than its tenant
        may hold beside what its other requests have."""
        most = self._most.get(request.tenant)
        if most is None:
            return False
        held = self._held[request.tenant]
        alone = held == sum(kv.num_pages for kv in request.kvs)
        return not alone and held + self.missing(request.kv, num_tokens) + spare > most

    # -- pages -----------------------------------------------------------------------------------

    def missing(self, kv: Kv, num_tokens: int) -> int:
        """Pages that ``kv`` lacks for ``num_tokens`` more."""
        num_pages = self._models[kv.model_id].kv.num_pages(kv.num_computed + num_tokens)
        return num_pages - kv.num_pages

    def obtain(self, request: Request, num_tokens: int) -> bool:
        """Give ``request`` the pages of its next ``num_tokens``; False, and nothing has changed, if
        the pool or its tenant's share has not so many."""
        need = self.missing(request.kv, num_tokens)
        if need <= 0:
            return True
        if self.exceed_share(request, num_tokens):
            return False
        frames = self._pool.obtain(need, Owner.KV)
        if frames is None:
            return False
        request.kv.add_frames(frames)
        self._held[request.tenant] += need
        return True

    def release(self, request: Request, kv: Kv, *, keep: bool = True) -> list[int]:
        """``request`` gives up its pages of ``kv``; the frames that are free now. ``keep=False``:
        what they hold is not to be trusted."""
        prefix = self._pool.prefix
        idle = prefix.num_idle
        freed = prefix.release(kv.take_frames(), keep=keep)
        self._count(request, idle - prefix.num_idle - len(freed))
        return freed

    def _count(self, request: Request, more: int) -> None:
        self._held[request.tenant] += more
        if not self._held[request.tenant]:
            del self._held[request.tenant]

    # -- the prefix cache ------------------------------------------------------------------------

    def take_cached(self, request: Request) -> int:
        """Start ``request`` from what the prefix cache has of its beginning: so many tokens.

        At least the last id is always computed: its logits are wanted. A request that asks for
        its prompt's log-probabilities computes everything.
        """
        kv, prefix = request.kv, self._pool.prefix
        idle = prefix.num_idle
        hits = prefix.match(self._reusable(request))
        kv.add_frames(hits)
        kv.num_shared = len(hits)
        kv.num_computed = len(hits) * self._models[kv.model_id].kv.page_tokens
        self._count(request, idle - prefix.num_idle)
        if self.exceed_share(request, 0):
            self.release(request, kv)
        return kv.num_computed

    def num_cached(self, request: Request) -> int:
        """How many tokens ``take_cached`` would find now."""
        num_pages = self._pool.prefix.num_cached(self._reusable(request))
        return num_pages * self._models[request.kv.model_id].kv.page_tokens

    def _reusable(self, request: Request) -> list[bytes]:
        """Keys of the pages that ``request`` takes if they are cached."""
        if not self._caching or request.wants_prompt_logprobs:
            return []
        page_tokens = self._models[request.kv.model_id].kv.page_tokens
        return self._keys(request, (request.num_ids - 1) // page_tokens)

    def cache_full(self, request: Request) -> None:
        """Let others find the pages of ``request`` that are full."""
        kv = request.kv
        full = kv.num_computed // self._models[kv.model_id].kv.page_tokens
        if not self._caching or full == kv.num_shared:
            return
        keys = self._keys(request, full)
        for page in range(kv.num_shared, full):
            self._pool.prefix.insert(keys[page], int(kv.page_table[page]))
        kv.num_shared = full

    def _keys(self, request: Request, num_pages: int) -> list[bytes]:
        """Content keys of the first ``num_pages`` pages, all of them full."""
        keys = request.kv.page_keys
        parent = keys[-1] if keys else self._root(request)
        size = self._models[request.kv.model_id].kv.page_tokens
        for page in range(len(keys), num_pages):
            parent = page_key(parent, request.ids[page * size : (page + 1) * size])
            keys.append(parent)
        return keys[:num_pages]

    def _root(self, request: Request) -> bytes:
        return root_key(
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            model_id=request.kv.model_id,
            fingerprint=self._models[request.kv.model_id].fingerprint,
            adapters=request.kv.adapters,
        )
