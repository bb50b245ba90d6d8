"""The engine as a plain object: token ids in, token ids out, one ``step`` at a time.

It owns the model and the pool and nothing else: no text, no sockets, no names. The process around
it is ``main.py``; most tests step it in-process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from loramux.adapters.residency import EVICTED_FOR, Residency
from loramux.engine.models import Partner
from loramux.engine.picture import picture
from loramux.engine.scheduler import Scheduler
from loramux.engine.step import StepLoop
from loramux.errors import EngineFailed, InvalidRequest, LoramuxError, Overloaded
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.memory.shortage import is_shortage
from loramux.metrics.picture import Picture
from loramux.metrics.stats import PoolStats, StepStats
from loramux.model.runner import ModelRunner
from loramux.request import SMALL_MODEL_ID, EntropyAdaptive, Kv, Request
from loramux.sampling.sampler import Sampler
from loramux.speculation.drafting import Drafting
from loramux.speculation.entropy import Router
from loramux.speculation.own_heads import OwnHeads
from loramux.wire import Command, Failed, StepDone, Submit

log = logging.getLogger(__name__)

STATS_EVERY_S = 1.0
"""Idle or loading, the front still hears this often how the pool stands; busy, which adapters are
in it."""


class Engine:
    """A model and its ``partners`` by model id, their pool, and the requests running on them. With
    ``overlap`` a step's results come from the next call of ``step``. ``new_router`` makes what says
    when an entropy-adaptive request moves."""

    def __init__(
        self,
        *,
        pool: Pool,
        scheduler: Scheduler,
        residency: Residency,
        runner: ModelRunner,
        sampler: Sampler,
        drafting: Drafting,
        partners: Mapping[int, Partner],
        own_heads: OwnHeads,
        epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = False,
    ) -> None:
        self.pool = pool
        self.residency = residency
        self.drafting = drafting
        self.partners = partners
        self.own_heads = own_heads
        self._residencies = [residency, *(partner.residency for partner in partners.values())]
        self.new_router: Callable[[EntropyAdaptive, bytes | None, int], Router] = Router.resumed
        self.scheduler = scheduler
        self._loop = StepLoop(
            scheduler, residency, runner, sampler, drafting, partners, clock, overlap=overlap
        )
        self._sampler = sampler
        self._epoch = epoch
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._refused: list[Failed] = []
        self._num_steps = 0
        self._told_version = -1
        self._told_waiting = 0
        self._told_pins: list[str] = []
        self._told_lists = float("-inf")

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished, or a refusal has still to be reported."""
        return bool(self._requests or self._refused)

    @property
    def num_loading(self) -> int:
        """Adapters on their way into the pool."""
        return sum(residency.num_loading for residency in self._residencies)

    def on_loaded(self, call: Callable[[], None]) -> None:
        """``call`` is called, on a thread of a loader, when there may be more to do."""
        for residency in self._residencies:
            residency.on_loaded = call

    def on_running(self, call: Callable[[Sequence[str]], None]) -> None:
        """``call`` is called, in a step, with the ids of the requests that it is at from then on;
        with none where it is at none in particular."""
        self._loop.on_running = call

    @property
    def predicted_s(self) -> float:
        """How long the step that is on its way was expected to take; may be read by any thread."""
        return self._loop.predicted_s

    def submit(self, message: Submit) -> None:
        """Queue a request; one that can never run is refused in the next step's report."""
        try:
            self._add(message)
        except LoramuxError as error:
            failed = Failed(message.request_id, error.code, error.message, error.param)
            self._refused.append(failed)
        except Exception as error:
            log.exception("%s could not be queued", message.request_id)
            code, why = EngineFailed.code, "the engine met an internal error when it was to begin"
            if is_shortage(error):
                code, why = Overloaded.code, "there was no memory to begin with the request"
            self._refused.append(Failed(message.request_id, code, why))

    def _add(self, message: Submit) -> None:
        request = Request(
            message.request_id,
            prompt_ids=message.prompt_ids,
            output_ids=message.output_ids,
            sampling=message.sampling,
            adapters=message.adapters,
            model_id=message.model_id,
            tenant=message.tenant,
            pool_share=message.pool_share,
            cache_salt=message.cache_salt,
            speculation=message.speculation,
            companions=message.companions,
            arrival=self._clock(),
            deadline=None if message.deadline_s is None else self._clock() + message.deadline_s,
        )
        if message.entropy is not None:
            self._route(request, message.entropy, message)
        self.scheduler.check_fits(request)
        self._sampler.add(
            request.id,
            request.sampling,
            message.prompt_ids,
            message.output_ids,
            watched=request.router is not None,
        )
        self.scheduler.add(request)
        self._requests[request.id] = request

    def _route(self, request: Request, how: EntropyAdaptive, message: Submit) -> None:
        """Let ``request`` move between the target and the small model."""
        small = self.partners.get(SMALL_MODEL_ID)
        if small is None:
            raise InvalidRequest(
                "entropy_adaptive: this engine has no --small-model", param="entropy_adaptive"
            )
        if request.max_ids > small.max_model_len:
            raise InvalidRequest(
                f"entropy_adaptive: prompt and max_tokens are {request.max_ids} tokens, the small "
                f"model was made for {small.max_model_len}",
                param="entropy_adaptive",
            )
        router = self.new_router(how, message.resume, len(message.output_ids))
        request.route(router, Kv(SMALL_MODEL_ID, message.companions.get(SMALL_MODEL_ID, ())))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests now; frames and leases are free when this returns."""
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                self.scheduler.finish(request)
                self._forget(request)

    def step(self) -> StepDone:
        """One step of every request that can run; what it produced and how things stand."""
        report = self._loop.step()
        for request in report.ended:
            self._forget(request)
        failed = self._refused + report.failed
        self._refused = []
        self._num_steps += report.stats.batch_rows > 0
        self._fill(report.stats)
        return StepDone(
            engine_epoch=self._epoch,
            step=self._num_steps,
            outputs=report.outputs,
            finished=report.finished,
            failed=failed,
            stats=msgspec.to_builtins(report.stats),
        )

    def command(self, command: Command) -> dict[str, object]:
        """Carry out an operator's wish. Raises LoramuxError when it cannot be done now. Whose
        digest is to be evicted, an adapter's or a file of heads, goes without saying."""
        digest = command.digest or ""
        if command.kind == "pin" and not self.residency.pin(digest):
            raise LoramuxError(
                "no room in the pool to pin the adapter: pinned adapters may take half of it",
                code="pool_full",
            )
        if command.kind == "unpin":
            self.residency.unpin(digest)
        if command.kind == "evict" and not all([r.evict(digest) for r in self._residencies]):
            raise LoramuxError("the adapter is in use", code="adapter_in_use")
        if command.kind == "evict":
            self.own_heads.forget(digest)
        if command.kind == "state":
            return {"pid": os.getpid(), "picture": msgspec.to_builtins(self._picture())}
        return {"resident": self._resident(), "pinned": self.residency.pinned()}

    def _picture(self) -> Picture:
        return picture(
            self.pool,
            self._residencies,
            self.scheduler,
            self._loop.batches,
            requests_now=self._clock(),
            loads_now=time.monotonic(),
        )

    def check(self) -> None:
        """The books balance; an error here is a bug of ours."""
        self.pool.check()
        books = [residency.check() for residency in self._residencies]
        assert self.pool.frames.count(Owner.ADAPTER) == sum(held for held, _ in books)
        assert self.pool.frames.count(Owner.LOADING) == sum(loading for _, loading in books)
        if not self.has_work and not self.num_loading:
            assert self.pool.frames.count(Owner.KV) == 0

    def close(self) -> None:
        """Stop the loaders' threads."""
        self.own_heads.close()
        for residency in self._residencies:
            residency.close()

    def _resident(self) -> list[str]:
        """Digests rows may run on now, on any of the models."""
        return [digest for residency in self._residencies for digest in residency.resident()]

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        self.drafting.ended(request)
        self._sampler.remove(request.id)

    def _fill(self, stats: StepStats) -> None:
        frames = self.pool.frames
        leased = sum(residency.num_leased_frames() for residency in self._residencies)
        idle = self.pool.prefix.num_idle
        stats.pool = PoolStats(
            total=frames.num_frames,
            free=frames.num_free,
            kv=frames.count(Owner.KV) + frames.count(Owner.PREFIX) - idle,
            prefix=idle,
            adapter_leased=leased,
            adapter_warm=frames.count(Owner.ADAPTER) - leased,
            loading=frames.count(Owner.LOADING),
        )
        stats.num_running = len(self.scheduler.running)
        stats.num_waiting = len(self.scheduler.waiting)
        stats.num_loading = self.num_loading
        stats.arrival_wait_s = self.residency.take_waited_s()
        evicted = dict.fromkeys(EVICTED_FOR, 0)
        for residency in self._residencies:
            stats.loads += residency.finished_loads
            residency.finished_loads = []
            stats.shortages += residency.errors.num_shortages
            residency.errors.num_shortages = 0
            for reason, num in residency.take_evictions().items():
                evicted[reason] += num
        evicted_pages, self.pool.prefix.num_evicted = self.pool.prefix.num_evicted, 0
        stats.evictions = {"adapter": sum(evicted.values()), "prefix": evicted_pages}
        stats.adapter_evictions = evicted
        self._list_adapters(stats)

    def _list_adapters(self, stats: StepStats) -> None:
        """Lists are as long as there are adapters: a busy engine tells them now and then only."""
        now = self._clock()
        if stats.batch_rows and now < self._told_lists + STATS_EVERY_S:
            return
        self._told_lists = now
        if (oldest := self.scheduler.waiting.oldest_arrival()) is not None:
            stats.oldest_waiting_s = now - oldest
        if self.scheduler.waiting.version != self._told_waiting:
            self._told_waiting = self.scheduler.waiting.version
            stats.waiting_adapters = self.scheduler.waiting.digests()
        if (version := sum(r.version for r in self._residencies)) != self._told_version:
            self._told_version = version
            stats.resident = self._resident()
        if self.residency.pinned() is not self._told_pins:
            stats.pinned = self._told_pins = self.residency.pinned()
