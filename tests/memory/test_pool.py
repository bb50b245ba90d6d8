"""The pool's books balance whatever happens, and eviction follows one order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.memory.formats import AdapterFormat, KvFormat
from loramux.memory.frames import FramePool, Owner
from loramux.memory.pool import Pool
from loramux.memory.prefix import page_key, root_key
from loramux.request import AdapterRef


def test_take_is_all_or_nothing() -> None:
    pool = FramePool(3)
    assert pool.take(4, Owner.KV) is None
    assert pool.num_free == 3
    frames = pool.take(3, Owner.KV)
    assert frames is not None and len(set(frames)) == 3
    assert pool.take(1, Owner.ADAPTER) is None
    pool.check()


def test_a_frame_cannot_be_given_back_by_a_stranger() -> None:
    pool = FramePool(2)
    frames = pool.take(1, Owner.KV)
    assert frames is not None
    with pytest.raises(AssertionError):
        pool.give_back(frames, Owner.ADAPTER)


def test_freed_frames_are_told_before_they_can_be_taken_again() -> None:
    told: list[int] = []
    pool = FramePool(2, told.extend)
    frames = pool.take(2, Owner.KV)
    assert frames is not None
    pool.give_back(frames, Owner.KV)
    assert sorted(told) == [0, 1]


def _keys(*pages: int) -> list[bytes]:
    parent, keys = b"root", []
    for page in pages:
        parent = page_key(parent, np.array([page]))
        keys.append(parent)
    return keys


def _cache(pool: Pool, keys: list[bytes]) -> list[int]:
    """A request that computed ``keys`` and ended."""
    frames = pool.obtain(len(keys), Owner.KV)
    assert frames is not None
    for key, frame in zip(keys, frames, strict=True):
        pool.prefix.insert(key, frame)
    pool.prefix.release(frames)
    return frames


def test_pages_of_an_ended_request_are_found_again() -> None:
    pool = Pool(4)
    frames = _cache(pool, _keys(1, 2, 3))
    assert pool.prefix.match(_keys(1, 2, 9)) == frames[:2]
    pool.prefix.release(frames[:2])
    assert pool.prefix.match(_keys(7)) == []
    pool.check()


def test_the_tail_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = Pool(3)
    frames = _cache(pool, _keys(1, 2, 3))
    assert pool.obtain(1, Owner.KV) is not None
    assert pool.prefix.match(_keys(1, 2, 3)) == frames[:2]
    pool.check()


def test_pages_in_use_are_never_evicted() -> None:
    pool = Pool(3)
    _cache(pool, _keys(1, 2, 3))
    held = pool.prefix.match(_keys(1, 2))
    assert pool.obtain(2, Owner.KV) is None, "only one page is idle"
    assert pool.obtain(1, Owner.KV) is not None
    pool.prefix.release(held)
    pool.check()


def test_two_requests_that_computed_the_same_page_keep_one() -> None:
    pool = Pool(4)
    first, second = pool.obtain(1, Owner.KV), pool.obtain(1, Owner.KV)
    assert first is not None and second is not None
    (key,) = _keys(5)
    pool.prefix.insert(key, first[0])
    pool.prefix.insert(key, second[0])
    pool.prefix.release(second)
    assert pool.prefix.match([key]) == first
    pool.prefix.release(first)
    pool.prefix.release(first)
    assert pool.frames.num_free == 3
    pool.check()


def test_distrusted_pages_leave_the_cache() -> None:
    pool = Pool(2)
    frames = pool.obtain(2, Owner.KV)
    assert frames is not None
    keys = _keys(1, 2)
    pool.prefix.insert(keys[0], frames[0])
    pool.prefix.release(frames, keep=False)
    assert pool.prefix.match(keys) == []
    assert pool.frames.num_free == 2
    pool.check()


def test_eviction_weighs_the_cost_to_bring_back_against_size() -> None:
    pool = Pool(8)
    evicted: list[str] = []

    def offer(name: str, num_frames: int, cost_s: float) -> None:
        frames = pool.frames.take(num_frames, Owner.ADAPTER)
        assert frames is not None

        def evict() -> None:
            evicted.append(name)
            pool.frames.give_back(frames, Owner.ADAPTER)

        pool.order.offer(name, num_frames=num_frames, cost_s=cost_s, evict=evict)

    offer("dear", 2, 10.0)
    offer("cheap and large", 4, 1.0)
    offer("cheap and small", 2, 1.0)
    assert pool.obtain(1, Owner.KV) is not None
    assert evicted == ["cheap and large"]
    assert pool.obtain(4, Owner.KV) is not None
    assert evicted == ["cheap and large", "cheap and small"]
    assert pool.obtain(3, Owner.KV) is not None or evicted[-1] != "dear"


def test_what_is_never_used_again_goes_even_if_it_was_dear() -> None:
    pool = Pool(2)
    dear = pool.frames.take(1, Owner.ADAPTER)
    assert dear is not None
    gone: list[bool] = []

    def evict() -> None:
        gone.append(True)
        pool.frames.give_back(dear, Owner.ADAPTER)

    pool.order.offer("dear", num_frames=1, cost_s=0.1, evict=evict)
    for page in range(100):
        _cache(pool, _keys(page))
    assert gone


ROOT = {
    "tenant": "",
    "cache_salt": "",
    "model_id": 0,
    "fingerprint": "f",
    "adapters": (),
}


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "t"},
        {"cache_salt": "t"},
        {"model_id": 1},
        {"fingerprint": "g"},
        {"adapters": (AdapterRef("d"),)},
        {"adapters": (AdapterRef("d", 0.5),)},
        {"adapters": (AdapterRef("d"), AdapterRef("e"))},
        {"adapters": (AdapterRef("e"), AdapterRef("d"))},
    ],
)
def test_everything_the_bytes_depend_on_is_in_the_root_key(change: dict[str, object]) -> None:
    keys = {root_key(**{**ROOT, **other}) for other in ({}, change)}  # type: ignore[arg-type]
    assert len(keys) == 2


def test_a_salt_that_spells_an_adapter_shares_nothing_with_it() -> None:
    salted = root_key(**{**ROOT, "cache_salt": "d"})  # type: ignore[arg-type]
    adapted = root_key(**{**ROOT, "adapters": (AdapterRef("d"),)})  # type: ignore[arg-type]
    moved = root_key(**{**ROOT, "tenant": "ab", "cache_salt": "c"})  # type: ignore[arg-type]
    other = root_key(**{**ROOT, "tenant": "a", "cache_salt": "bc"})  # type: ignore[arg-type]
    assert len({salted, adapted, moved, other}) == 4


def test_formats_cover_their_frames_exactly_once() -> None:
    kv = KvFormat(0, num_layers=3, num_kv_heads=2, head_dim=4, page_tokens=2, itemsize=4)
    assert kv.frame.slice_bytes == 2 * 2 * 2 * 4 * 4
    frames = [2, 0, 5]
    offsets = kv.offsets(np.array(frames))
    slices = AdapterFormat(kv.frame).slices(frames)
    assert offsets.shape == (3, 3)
    assert sorted(offsets.ravel().tolist()) == sorted(slices.tolist())
    assert slices.tolist() == [
        f * kv.frame.frame_bytes + s * kv.frame.slice_bytes for f in frames for s in range(3)
    ]
    assert AdapterFormat(kv.frame).num_frames(kv.frame.frame_bytes) == 1
    assert AdapterFormat(kv.frame).num_frames(kv.frame.frame_bytes + 1) == 2


class PoolMachine(RuleBasedStateMachine):
    """Requests that grow, share prefixes and end; adapters that come, are leased and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(12)
        self.requests: list[tuple[list[bytes], list[int], int]] = []
        self.adapters: dict[int, tuple[list[int], int]] = {}

    @rule(pages=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def start(self, pages: list[int]) -> None:
        keys = _keys(*pages)
        frames = self.pool.prefix.match(keys)
        more = self.pool.obtain(len(keys) - len(frames), Owner.KV)
        if more is None:
            self.pool.prefix.release(frames)
            return
        for key, frame in zip(keys[len(frames) :], more, strict=True):
            self.pool.prefix.insert(key, frame)
        self.requests.append((keys, frames + more, 0))

    @rule(index=st.integers(0, 5), keep=st.booleans())
    def end(self, index: int, keep: bool) -> None:
        if index < len(self.requests):
            _, frames, _ = self.requests.pop(index)
            self.pool.prefix.release(frames, keep=keep)

    @rule(name=st.integers(0, 4), num=st.integers(1, 6), cost=st.floats(0, 10))
    def touch_adapter(self, name: int, num: int, cost: float) -> None:
        if name in self.adapters:
            self.pool.order.withdraw(name + 1000)
            frames, _ = self.adapters.pop(name)
        else:
            got = self.pool.obtain(num, Owner.ADAPTER)
            if got is None:
                return
            frames = got
        self.adapters[name] = (frames, len(frames))

        def evict() -> None:
            self.pool.frames.give_back(self.adapters.pop(name)[0], Owner.ADAPTER)

        self.pool.order.offer(name + 1000, num_frames=len(frames), cost_s=cost, evict=evict)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        assert self.pool.frames.count(Owner.ADAPTER) == sum(n for _, n in self.adapters.values())
        held = {f for _, frames, _ in self.requests for f in frames}
        assert all(self.pool.frames.owner(f) in (Owner.KV, Owner.PREFIX) for f in held)
        assert self.pool.num_available <= self.pool.frames.num_frames - len(held)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
