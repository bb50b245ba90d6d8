"""Cached KV pages by content: a page's key hashes everything its bytes depend on.

    root(tenant, salt, model, base, adapters) ──> key(root, page 0) ──> key(that, page 1) ──> ...

Names never enter a key, only digests, and every field is length-prefixed, so no two histories can
spell the same bytes (vLLM's salt-equals-adapter-name collision is the example to avoid).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramux.memory.eviction import EvictionOrder
from loramux.memory.frames import FramePool, Owner
from loramux.request import Adapters

_DOMAIN = b"loramux/kv/1"


def root_key(
    *, tenant: str, cache_salt: str, model_id: int, fingerprint: str, adapters: Adapters
) -> bytes:
    """The key every chain of one (tenant, salt, model, adapter list) starts from."""
    digest = hashlib.sha256(_DOMAIN)
    parts = [tenant.encode(), cache_salt.encode(), str(model_id).encode(), fingerprint.encode()]
    for ref in adapters:
        parts += [ref.digest.encode(), struct.pack("<d", ref.scale)]
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def page_key(parent: bytes, token_ids: npt.NDArray[np.int64]) -> bytes:
    """The key of a full page holding ``token_ids`` after the pages behind ``parent``."""
    return hashlib.sha256(parent + token_ids.astype("<i8", copy=False).tobytes()).digest()


class PrefixIndex:
    """Full, immutable KV pages: key -> frame, with a count of the requests that run on each.

    A page nobody runs on stays (``num_idle`` of them do), offered to the eviction order.
    ``page_cost_s`` is what computing one page again would take.
    """

    def __init__(self, pool: FramePool, order: EvictionOrder, page_cost_s: float = 0.01) -> None:
        self.page_cost_s = page_cost_s
        self.num_evicted = 0
        self.num_idle = 0
        self._pool = pool
        self._order = order
        self._frame_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._users: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._frame_of)

    def idle_frames(self) -> list[int]:
        """Frames of pages that nobody runs on."""
        return [frame for frame, users in self._users.items() if users == 0]

    def num_cached(self, keys: Sequence[bytes]) -> int:
        """How many frames ``match`` would find now."""
        return next((at for at, key in enumerate(keys) if key not in self._frame_of), len(keys))

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Frames of the longest cached beginning of ``keys``, each held for the caller."""
        frames: list[int] = []
        for key in keys:
            frame = self._frame_of.get(key)
            if frame is None:
                break
            if self._users[frame] == 0:
                self._order.withdraw(frame)
                self.num_idle -= 1
            self._users[frame] += 1
            frames.append(frame)
        return frames

    def insert(self, key: bytes, frame: int) -> None:
        """The KV frame ``frame`` of a running request is full and its content is ``key``.

        If another request cached the same content first, ``frame`` stays the request's own.
        """
        if key in self._frame_of:
            return
        self._pool.transfer((frame,), Owner.KV, Owner.PREFIX)
        self._frame_of[key] = frame
        self._key_of[frame] = key
        self._users[frame] = 1

    def release(self, frames: Sequence[int], *, keep: bool = True) -> list[int]:
        """A request lets go of its ``frames`` (in order of position); which of them are free now.

        Its own unshared pages are freed, the cached ones stay. ``keep=False``: what they hold is
        not to be trusted, so pages nobody else runs on are dropped from the cache too.
        """
        freed = []
        for frame in reversed(frames):
            users = self._users.get(frame)
            if users is None:
                self._pool.give_back([frame], Owner.KV)
                freed.append(frame)
            elif users > 1:
                self._users[frame] = users - 1
            elif keep:
                self._users[frame] = 0
                self.num_idle += 1
                self._order.offer(
                    frame,
                    num_frames=1,
                    cost_s=self.page_cost_s,
                    evict=lambda frame=frame: self._evict(frame),  # type: ignore[misc]
                )
            else:
                self._drop(frame)
                freed.append(frame)
        return freed

    def _evict(self, frame: int) -> None:
        self.num_evicted += 1
        self.num_idle -= 1
        self._drop(frame)

    def _drop(self, frame: int) -> None:
        del self._frame_of[self._key_of.pop(frame)]
        del self._users[frame]
        self._pool.give_back([frame], Owner.PREFIX)

    def check(self) -> None:
        """Recount; an error here is a bug of ours."""
        assert len(self._frame_of) == len(self._key_of) == len(self._users)
        assert self._pool.count(Owner.PREFIX) == len(self._users)
        assert self.num_idle == sum(users == 0 for users in self._users.values())
        for frame, users in self._users.items():
            assert self._pool.owner(frame) is Owner.PREFIX
            assert (users == 0) == (frame in self._order)
