"""What scheduler tests need around a scheduler: adapters that are integers, requests in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loramux.engine.limits import Limits
from loramux.engine.scheduler import Scheduler
from loramux.memory.formats import KvFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.request import AdapterRef, Request, SamplingParams, Status

KV = KvFormat(0, num_layers=1, num_kv_heads=1, head_dim=1, page_tokens=4, itemsize=4)


class FakeAdapters:
    """Adapters of a given number of frames, whose loads land when the test says so."""

    def __init__(self, pool: Pool, sizes: dict[str, int]) -> None:
        self.pool = pool
        self.sizes = sizes
        self.loading: dict[str, list[int]] = {}
        self.frames: dict[str, list[int]] = {}
        self.leases: dict[str, int] = {}
        self.loads: list[str] = []
        self.wanted: list[str] = []

    def num_frames(self, *digests: str) -> int:
        return sum(self.sizes[digest] for digest in set(digests))

    def num_frames_to_load(self, digest: str) -> int:
        return self.sizes[digest]

    def is_resident(self, digest: str) -> bool:
        return digest in self.frames

    def load(self, digest: str, *, ahead: bool = False) -> bool:
        if digest in self.frames or digest in self.loading:
            return True
        below = self.pool.order.worth(num_frames=1, cost_s=1.0) if ahead else math.inf
        frames = self.pool.obtain(self.sizes[digest], Owner.LOADING, below)
        if frames is None:
            return False
        self.loading[digest] = frames
        self.loads.append(digest)
        return True

    def land(self) -> None:
        """Every load under way is done."""
        for digest, frames in self.loading.items():
            self.pool.frames.transfer(frames, Owner.LOADING, Owner.ADAPTER)
            self.frames[digest] = frames
            self.leases[digest] = 0
            self._offer(digest)
        self.loading = {}

    def _offer(self, digest: str) -> None:
        def evict() -> None:
            self.pool.frames.give_back(self.frames.pop(digest), Owner.ADAPTER)

        self.pool.order.offer(digest, num_frames=len(self.frames[digest]), cost_s=1.0, evict=evict)

    def prioritize(self, wanted: Sequence[str]) -> None:
        self.wanted = list(wanted)

    def lease(self, digest: str) -> int:
        return self.hold(digest)

    def hold(self, digest: str) -> int:
        if self.leases[digest] == 0:
            self.pool.order.withdraw(digest)
        self.leases[digest] += 1
        return 0

    def release(self, digest: str) -> None:
        self.leases[digest] -= 1
        if self.leases[digest] == 0:
            self._offer(digest)


class Bench:
    """A scheduler on its own: ``step`` lets every scheduled row sample token 7."""

    def __init__(self, num_frames: int, adapters: dict[str, int] | None = None, **limits: Any):
        self.pool = Pool(num_frames)
        self.adapters = FakeAdapters(self.pool, adapters or {})
        defaults = {"max_num_seqs": 8, "max_batch_tokens": 64, "fairness_debt_tokens": 10**9}
        self.scheduler = Scheduler(
            pool=self.pool,
            kv=KV,
            adapters=self.adapters,
            limits=Limits(**{**defaults, **limits}),
            fingerprint="f",
            clock=lambda: 0.0,
        )
        self.finished: list[Request] = []

    def add(self, name: str, num_prompt: int = 4, *, max_tokens: int = 4, **knobs: Any) -> Request:
        adapter = knobs.pop("adapter", None)
        ids = knobs.pop("ids", None) or [hash(name) % 1000 + i for i in range(num_prompt)]
        request = Request(
            name,
            prompt_ids=ids,
            sampling=SamplingParams(seed=0, max_tokens=max_tokens),
            adapters=() if adapter is None else (AdapterRef(adapter),),
            **knobs,
        )
        self.scheduler.check_fits(request)
        self.scheduler.add(request)
        return request

    def step(self, *, land: bool = True) -> dict[str, int]:
        """One step; what each row computed, by request id."""
        batches = self.scheduler.schedule()
        ran = {row.request.id: row.num_tokens for batch in batches for row in batch.rows}
        num_rows = sum(len(batch.rows) for batch in batches)
        assert len(ran) == num_rows, "a request has two rows"
        for batch in batches:
            running = [row.request.status is Status.RUNNING for row in batch.rows]
            assert all(running), "a row of a request that gave up its pages"
            self.scheduler.launched(batch)
            sampled = [[7] if row.samples else [] for row in batch.rows]
            self.scheduler.commit(batch, sampled)
            for row in batch.rows:
                request = row.request
                if request.num_ids == request.max_ids:
                    self.scheduler.finish(request)
                    self.finished.append(request)
        if land:
            self.adapters.land()
        self.pool.check()
        return ran

    def run(self, most: int = 2000) -> int:
        """Step until nothing is left; how many steps that took."""
        for count in range(most):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                return count
            self.step()
        raise AssertionError("the scheduler does not come to an end")
