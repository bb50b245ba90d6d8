"""Who runs this step, with how many tokens, and where their KV goes. Integers only, no torch.

A step is ``{row: number of tokens}``: a prefill chunk and a decode are the same kind of row.
Frames are had in this order: free ones, evicted ones, what the newest running request has on the
model that does not serve it now, all that the newest one has (preempted: it waits again and
recomputes), else the row waits. When it is its tenant's share of the pool that is used up, only the
tenant's own give way or wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from loramux.batch import Batch, Row
from loramux.engine.deadlines import Deadlines
from loramux.engine.limits import Limits, StepRoom
from loramux.engine.pages import Pages
from loramux.engine.policy import FairOrder
from loramux.engine.served import Adapters, Served
from loramux.errors import LoramuxError, RequestTooLarge
from loramux.memory.formats import KvFormat
from loramux.memory.pool import Pool
from loramux.request import BASE_MODEL_ID, Request, Status

PATIENCE_STEPS = 64
"""How often the least served waiting request may be passed over for lack of frames before nobody
behind it is admitted any more: from then on freed frames gather for it."""
LOOKAHEAD = 32
"""Waiting requests, one of each key, that a step looks at beyond those it admits: they may overtake
one that waits for its adapter, and their own adapters are fetched before it is their turn."""


class Wait(Enum):
    """Why a request waits: it was passed over for one of the first two, or not looked at."""

    LOADING = "its adapter is on its way"
    FRAMES = "no frames for its adapter or its KV"
    SHARE = "its tenant's rows hold all the frames they may"
    SEATS = "every seat of the batch is taken"
    TURN = "those before it go first"


@dataclass
class Counts:
    """What happened since the engine last reported."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed: list[tuple[Request, LoramuxError]] = field(default_factory=list)


class Scheduler:
    """The waiting and running requests of one engine. ``partners``, by model id, are those that
    requests may move to from the model whose ``kv``, ``adapters`` and ``fingerprint`` these are."""

    def __init__(
        self,
        *,
        pool: Pool,
        kv: KvFormat,
        adapters: Adapters,
        limits: Limits,
        fingerprint: str,
        partners: Mapping[int, Served] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.waiting = FairOrder()
        self.running: list[Request] = []
        self.counts = Counts()
        self.room = StepRoom(limits.max_batch_tokens)
        self._pool = pool
        self._models = {BASE_MODEL_ID: Served(kv, adapters, fingerprint), **(partners or {})}
        self._pages = Pages(pool, self._models, caching=limits.prefix_caching)
        self.deadlines = Deadlines(
            limits.first_token_slo_s, limits.max_batch_tokens, self._pages.num_cached
        )
        self._limits = limits
        self._clock = clock
        self._passed_over: dict[str, int] = {}
        self._outcomes: dict[str, Wait] = {}

    def check_fits(self, request: Request) -> None:
        """Raises LoramuxError if ``request`` could never run: too large, or its adapter is bad. One
        that moves between two models must fit on both at once."""
        frames = self._pages.check_share(request)
        for kv in request.kvs:
            adapters = self._models[kv.model_id].adapters
            frames += adapters.num_frames(*(ref.digest for ref in kv.adapters))
        if frames > self._pool.frames.num_frames:
            raise RequestTooLarge(
                f"the request needs {frames} frames of the memory pool, which has "
                f"{self._pool.frames.num_frames}: lower max_tokens, or enlarge --pool-memory"
            )

    def add(self, request: Request) -> None:
        """Queue a ``request`` that fits."""
        for kv in request.kvs:
            kv.reserve(self._models[kv.model_id].kv.num_pages(request.max_ids))
        if self._pages.share_out(request):
            self.waiting.let_go(request.tenant)
        self.waiting.push(request)
        self.deadlines.add(request)

    def schedule(self) -> list[Batch]:
        """The next step's batches, one a model that has rows; none when no request can run now."""
        self._settle_debt()
        budget = self.room.tokens
        rows: list[Row] = []
        # Decodes first: a long prompt must not cost the others a token.
        for request in sorted(self.running, key=lambda r: r.num_pending > 1):
            if request.status is not Status.RUNNING:
                continue  # preempted by a row before it
            num_tokens = 0 if request.is_ending else min(request.num_pending, budget)
            if num_tokens and self._grow(request, num_tokens):
                rows.append(Row(request, num_tokens))
                budget -= num_tokens
        rows = [row for row in rows if row.request.status is Status.RUNNING]
        rows += self._admit(budget)
        by_model: dict[int, list[Row]] = {}
        for row in rows:
            by_model.setdefault(row.kv.model_id, []).append(row)
        return [Batch.of(model_id, by_model[model_id]) for model_id in sorted(by_model)]

    # -- frames ----------------------------------------------------------------------------------

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give ``request`` the pages its next tokens need, preempting newer ones if it must."""
        while not self._pages.obtain(request, num_tokens):
            givers = self.running
            if self._pages.exceed_share(request, num_tokens):
                givers = [other for other in givers if other.tenant == request.tenant]
            if self._drop_lagging(givers):
                continue
            newest = givers[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _drop_lagging(self, givers: Sequence[Request]) -> bool:
        """Of the newest of ``givers`` that has something on the model that does not serve it now,
        that goes: it costs nobody a step unless the request moves back. False if there is none."""
        for request in reversed(givers):
            if request.lagging is not None and request.lagging.num_pages:
                self._pages.release(request, request.lagging)
                self.waiting.let_go(request.tenant)
                return True
        return False

    def _preempt(self, request: Request) -> None:
        self.counts.preemptions += 1
        self._vacate(request)
        request.status = Status.WAITING
        self.waiting.push_back(request)

    def _vacate(self, request: Request, *, keep: bool = True) -> list[int]:
        """Take ``request`` off the batch: its pages are freed or stay cached, its leases end. The
        frames that are free now."""
        self.running.remove(request)
        freed = []
        for kv in request.kvs:
            freed += self._pages.release(request, kv, keep=keep)
        for adapters, digest in self._worn(request):
            adapters.release(digest)
        self.waiting.let_go(request.tenant)
        return freed

    def _worn(self, request: Request) -> list[tuple[Adapters, str]]:
        """The digests that ``request`` names, each with those it is one of. They are had for both
        of its models as long as it runs, so that it never waits for a load when it moves."""
        return [
            (self._models[kv.model_id].adapters, ref.digest)
            for kv in request.kvs
            for ref in kv.adapters
        ]

    # -- admission -------------------------------------------------------------------------------

    def _admit(self, budget: int) -> list[Row]:
        """Let waiting requests in, the least served adapter's first, as far as seats, tokens and
        frames go. One whose adapter is not here yet starts its load and is passed over; for those
        next in line the adapters are fetched ahead."""
        admitted: list[Row] = []
        self._outcomes = {}
        held: list[
            tuple[Adapters, str]
        ] = []  # what those ahead in line wait for must not be evicted by the rest
        passed: list[Request] = []
        with closing(self.waiting.walk()) as walk:
            line = (request for request in walk if not self._hold_back(request))
            while self._has_room(budget) and len(passed) < LOOKAHEAD:
                if (request := next(line, None)) is None:
                    break
                try:
                    outcome = self._admit_one(request, budget, held)
                except LoramuxError as error:
                    self.counts.failed.append((request, error))
                    continue
                if isinstance(outcome, Row):
                    admitted.append(outcome)
                    budget -= outcome.num_tokens
                    continue
                passed.append(request)
                self._outcomes[request.id] = outcome
                if self._out_of_patience(request, outcome):
                    break
            else:
                passed += self._fetch_ahead(list(islice(line, LOOKAHEAD - len(passed))), held)
        wanted = [worn for request in passed for worn in self._worn(request)]
        for model in self._models.values():
            model.adapters.prioritize([d for adapters, d in wanted if adapters is model.adapters])
        for adapters, digest in held:
            adapters.release(digest)
        return admitted

    def why_waiting(self, request: Request) -> Wait:
        """What ``request`` waits for, as of the last step."""
        if (outcome := self._outcomes.get(request.id)) is not None:
            return outcome
        if self.waiting.is_held_back(request.tenant):
            return Wait.SHARE
        return Wait.TURN if len(self.running) < self._limits.max_num_seqs else Wait.SEATS

    def _fetch_ahead(self, line: list[Request], held: list[tuple[Adapters, str]]) -> list[Request]:
        """Load the adapters of those in ``line`` as far as frames go, leaving one to every row that
        runs; whom that was tried for."""
        worn = [self._worn(request) for request in line]
        if all(adapters.is_resident(digest) for pairs in worn for adapters, digest in pairs):
            return line
        for index, request in enumerate(line):
            for adapters, digest in worn[index]:
                if adapters.is_resident(digest):
                    adapters.hold(digest)
                    held.append((adapters, digest))
                    continue
                try:
                    need = adapters.num_frames_to_load(digest) + len(self.running)
                    if need > self._pool.num_available:
                        return line[:index]
                    if not adapters.load(digest, ahead=True):
                        return line[:index]
                except LoramuxError as error:
                    self.counts.failed.append((request, error))
                    break
        return line

    def _has_room(self, budget: int) -> bool:
        return budget > 0 and len(self.running) < self._limits.max_num_seqs

    def _admit_one(
        self, request: Request, budget: int, held: list[tuple[Adapters, str]]
    ) -> Row | Wait:
        worn = self._worn(request)
        for adapters, digest in worn:
            if adapters.is_resident(digest):
                adapters.hold(digest)
                held.append((adapters, digest))
        loads = [adapters.load(digest) for adapters, digest in worn]
        if not all(loads):
            return Wait.FRAMES
        if not all(adapters.is_resident(digest) for adapters, digest in worn):
            return Wait.LOADING
        num_hit = self._pages.take_cached(request)
        num_tokens = min(request.num_pending, budget)
        # One page for each row that runs, so that admitting does not mean preempting next step.
        need = self._pages.missing(request.kv, num_tokens)
        short = self.running and need + len(self.running) > self._pool.num_available
        if short or not self._pages.obtain(request, num_tokens):
            self._pages.release(request, request.kv)
            return Wait.FRAMES
        self._enter(request, num_hit)
        return Row(request, num_tokens)

    def _hold_back(self, request: Request) -> bool:
        """Whether ``request`` would bring its tenant, with a page for each of its rows, above its
        share; then none of the tenant's waiting ones is looked at before one that runs gives frames
        back: smaller ones do not pass it over, and nobody else's wait behind it."""
        if not self._pages.is_limited(request):
            return False
        num_tokens = min(request.num_pending, self._limits.max_batch_tokens)
        rows = sum(other.tenant == request.tenant for other in self.running)
        if not self._pages.exceed_share(request, num_tokens, spare=rows):
            return False
        self.waiting.hold_back(request.tenant)
        return True

    def _enter(self, request: Request, num_hit: int) -> None:
        self.waiting.remove(request)
        self._passed_over.pop(request.id, None)
        request.status = Status.RUNNING
        self.running.append(request)
        for adapters, digest in self._worn(request):
            adapters.lease(digest)
        self.counts.prefix_queries += request.num_ids
        self.counts.prefix_hits += num_hit
        if request.first_scheduled is None:
            request.first_scheduled = self._clock()
            request.num_cached = num_hit

    def _out_of_patience(self, request: Request, why: Wait) -> bool:
        passed = self._passed_over.get(request.id, 0) + (why is Wait.FRAMES)
        self._passed_over[request.id] = passed
        return passed > PATIENCE_STEPS

    def _settle_debt(self) -> None:
        """When every seat is taken and someone has had far more than the one who waits, the
        newest row of the most served key makes room."""
        if len(self.running) < self._limits.max_num_seqs:
            return
        head = self.waiting.head()
        while head is not None and self._hold_back(head):
            head = self.waiting.head()
        if head is None:
            return
        served = self.waiting.served
        richest = max(self.running, key=lambda r: served[r.fair_key])
        newest = next(r for r in reversed(self.running) if r.fair_key == richest.fair_key)
        if self.waiting.debt(newest, head) <= self._limits.fairness_debt_tokens:
            return
        missing = [(a, digest) for a, digest in self._worn(head) if not a.is_resident(digest)]
        if missing:
            try:
                for adapters, digest in missing:
                    adapters.load(digest)
            except LoramuxError as error:
                self.counts.failed.append((head, error))
            return
        self._preempt(newest)

    @staticmethod
    def room_for_drafts(row: Row) -> int:
        """How far ahead ``row`` may guess: as far as it was asked to, and what could still be
        delivered."""
        request = row.request
        if not row.samples or request.speculation is None:
            return 0
        left = request.max_ids - request.num_ids - 1
        return max(0, min(left, request.speculation.max_draft_tokens))

    def budget_for_drafts(self, batches: Sequence[Batch]) -> int:
        """What is left of a step's tokens."""
        return self.room.tokens - sum(batch.num_tokens for batch in batches)

    def draft(
        self,
        row: Row,
        drafter: str,
        token_ids: Sequence[int],
        parents: Sequence[int] | None = None,
        grade: int = 0,
    ) -> None:
        """Have ``row`` guess ahead, unless there are no frames for it: nobody is preempted for
        guesses."""
        request = row.request
        if self._pages.obtain(request, row.num_tokens + len(token_ids)):
            request.ids[request.num_ids : request.num_ids + len(token_ids)] = token_ids
            row.drafts, row.parents, row.drafter, row.grade = token_ids, parents, drafter, grade
            row.num_tokens += len(token_ids)

    # -- during and after the step ---------------------------------------------------------------

    def launched(self, batch: Batch) -> None:
        """The batch is on its way: the next can be scheduled as if it had been computed."""
        for row in batch.rows:
            request = row.request
            prompt_left = max(request.num_prompt - request.kv.num_computed, 0)
            self.waiting.charge(
                request, inputs=min(prompt_left, row.num_tokens), outputs=row.samples
            )
            request.kv.num_computed += row.num_tokens - len(row.drafts)
            if row.samples:
                request.expect()

    def take_back(self, batch: Batch) -> None:
        """The batch is lost on its way: what it was for is computed again."""
        for row in batch.rows:
            request = row.request
            if request.status is Status.DONE:
                continue
            if row.samples:
                request.receive(())
            if request.status is Status.RUNNING:
                self._preempt(request)

    def commit(self, batch: Batch, sampled: Sequence[Sequence[int]]) -> None:
        """The batch was computed; ``sampled[i]`` are row i's new tokens, of which all but the last
        were guessed right: their KV is there, in order. Requests that ended meanwhile are not
        touched."""
        for row, token_ids in zip(batch.rows, sampled, strict=True):
            request = row.request
            if request.status is Status.DONE:
                continue
            if row.samples:
                request.receive(token_ids)
            if guessed := len(token_ids[1:]):
                request.kv.num_computed += guessed
                self.waiting.charge(request, inputs=0, outputs=guessed)
            self._pages.cache_full(request)
            if request.follow_router() and request.kv.num_pages == 0:
                self._pages.take_cached(request)  # of another's, or its own that went at need

    def finish(self, request: Request, *, keep: bool = True) -> list[int]:
        """``request`` is over, for whatever reason; the frames that are free now. ``keep=False``:
        do not trust its KV."""
        freed = []
        if request.status is Status.RUNNING:
            freed = self._vacate(request, keep=keep)
        else:
            self.waiting.remove(request)
            self._passed_over.pop(request.id, None)
        request.status = Status.DONE
        self.waiting.done(request)
        self.deadlines.done(request)
        return freed
