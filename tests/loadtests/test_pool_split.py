"""The pools that the product does not have: divided by quota, padded to the largest rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pool_split
import pytest

from loramux.engine import assemble as assembly
from loramux.engine import models as engine_models
from loramux.memory.formats import AdapterFormat, FrameShape
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from tests.tiny import write_model


def make(adapter_frames: int = 3) -> pool_split.SplitPool:
    return pool_split.SplitPool(10, adapter_frames=adapter_frames)


def hold(pool: pool_split.SplitPool, name: str, num: int) -> list[int]:
    """An idle adapter of ``num`` frames."""
    frames = pool.obtain(num, Owner.LOADING)
    assert frames is not None
    pool.frames.transfer(frames, Owner.LOADING, Owner.ADAPTER)
    pool.order.offer(
        name,
        num_frames=num,
        cost_s=1.0,
        evict=lambda: pool.frames.give_back(frames, Owner.ADAPTER),
    )
    return frames


def test_kv_never_takes_what_is_set_aside_for_adapters() -> None:
    pool = make()
    assert pool.num_available == 7
    taken = pool.obtain(6, Owner.KV)
    assert taken is not None and pool.num_available == 1
    assert pool.obtain(2, Owner.KV) is None
    assert pool.obtain(1, Owner.KV) is not None
    assert pool.obtain(1, Owner.KV) is None
    assert pool.frames.num_free == 3
    pool.check()


def test_kv_does_not_evict_adapters_though_they_are_idle() -> None:
    pool = make()
    hold(pool, "a", 3)
    assert pool.obtain(8, Owner.KV) is None
    assert pool.obtain(7, Owner.KV) is not None
    assert "a" in pool.order


def test_an_adapter_evicts_idle_adapters_only() -> None:
    pool = make()
    hold(pool, "a", 2)
    assert pool.obtain(4, Owner.LOADING) is None
    assert "a" in pool.order
    assert pool.obtain(2, Owner.LOADING) is not None
    assert "a" not in pool.order
    assert pool.obtain(2, Owner.LOADING) is None  # what loads cannot be evicted
    assert pool.obtain(1, Owner.LOADING) is not None
    assert pool.obtain(0, Owner.LOADING) == []
    assert pool.num_available == 7


def test_a_slot_has_room_for_the_largest_rank_whatever_it_holds() -> None:
    shape = FrameShape(num_slices=2, slice_bytes=64)
    padded = type("Padded", (pool_split.PaddedFormat,), {"slot_bytes": 300})(shape)
    assert [padded.num_frames(size) for size in (1, 128, 300)] == [3, 3, 3]
    assert [AdapterFormat(shape).num_frames(size) for size in (1, 128, 300)] == [1, 1, 3]
    with pytest.raises(AssertionError):
        padded.num_frames(301)


def test_the_model_is_shaped_like_the_one_it_stands_for() -> None:
    shape = pool_split.SHAPE
    page_bytes = 16 * 2 * 4 * shape["num_hidden_layers"] * shape["hidden_size"] // 4
    tokens = pool_split.adapter_bytes(shape, 16) / (page_bytes / 16)
    assert tokens == 640


def test_jobs_alternate_short_and_long_and_name_every_adapter() -> None:
    jobs = pool_split.mixed_jobs(5, 200, seed=0)
    assert len(jobs) == 200 and {job.adapter for job in jobs} == set(range(5))
    assert all(16 <= len(job.prompt) < 64 for job in jobs[::2])
    assert all(128 <= len(job.prompt) < 384 for job in jobs[1::2])


def test_ranks_come_in_turn() -> None:
    digests = {rank: [f"{rank}-{i}" for i in range(2)] for rank in pool_split.RANKS}
    assert pool_split.interleave(digests, 5) == ["8-0", "16-0", "32-0", "64-0", "8-1"]


def test_the_names_that_are_replaced_exist() -> None:
    with pool_split.divided("padded", 20, 300):
        made: Any = assembly.Pool(10)
        assert isinstance(made, pool_split.SplitPool) and made.num_available == 4
        shape = FrameShape(num_slices=2, slice_bytes=64)
        assert engine_models.AdapterFormat(shape).num_frames(1) == 3
    assert type(assembly.Pool(10)) is Pool


@pytest.mark.slow  # an engine is started
def test_an_engines_pool_is_the_one_asked_for(tmp_path: Path) -> None:
    served = pool_split.make_served(
        "padded", write_model(tmp_path / "base"), tmp_path / "data", 20, 10**6
    )
    residency = served.engine.residency
    assert type(residency._pool) is pool_split.SplitPool
    assert isinstance(residency._layout, pool_split.PaddedFormat)
    served.close()
