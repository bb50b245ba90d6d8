"""Who runs this step, with how many tokens, and where their KV goes. Integers only, no torch.

A step is ``{row: number of tokens}``: a prefill chunk and a decode are the same kind of row.
Frames are had in this order: free ones, evicted ones, what the newest running request has on the
model that does not serve it now, all that the newest one has (preempted: it waits again and
recomputes), else the row waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Protocol

from loramux.batch import Batch, Row
from loramux.engine.deadlines import Deadlines
from loramux.engine.policy import FairOrder
from loramux.errors import LoramuxError, RequestTooLarge
from loramux.memory.formats import KvFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.memory.prefix import page_key, root_key
from loramux.request import BASE_MODEL_ID, Kv, Request, Status

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
    SEATS = "every seat of the batch is taken"
    TURN = "those before it go first"


class Adapters(Protocol):
    """What the scheduler needs of residency."""

    def num_frames(self, *digests: str) -> int: ...
    def num_frames_to_load(self, digest: str) -> int: ...
    def is_resident(self, digest: str) -> bool: ...
    def load(self, digest: str, *, ahead: bool = False) -> bool: ...
    def prioritize(self, wanted: Sequence[str]) -> None: ...
    def hold(self, digest: str) -> int: ...
    def lease(self, digest: str) -> int: ...
    def release(self, digest: str) -> None: ...


@dataclass(frozen=True)
class Served:
    """A model whose rows are scheduled: how its KV lies, its adapters, and whose weights it has."""

    kv: KvFormat
    adapters: Adapters
    fingerprint: str


@dataclass(frozen=True)
class Limits:
    """The bounds of a step, and of the wait for a first token."""

    max_num_seqs: int
    max_batch_tokens: int
    fairness_debt_tokens: int
    prefix_caching: bool = True
    first_token_slo_s: float | None = None


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
        self.deadlines = Deadlines(
            limits.first_token_slo_s, limits.max_batch_tokens, self._num_cached
        )
        self._pool = pool
        self._models = {BASE_MODEL_ID: Served(kv, adapters, fingerprint), **(partners or {})}
        self._limits = limits
        self._clock = clock
        self._passed_over: dict[str, int] = {}
        self._outcomes: dict[str, Wait] = {}

    def check_fits(self, request: Request) -> None:
        """Raises LoramuxError if ``request`` could never run: too large, or its adapter is bad. One
        that moves between two models must fit on both at once."""
        frames = 0
        for kv in request.kvs:
            model = self._models[kv.model_id]
            frames += model.kv.num_pages(request.max_ids)
            frames += model.adapters.num_frames(*(ref.digest for ref in kv.adapters))
        if frames > self._pool.frames.num_frames:
            raise RequestTooLarge(
                f"the request needs {frames} frames of the memory pool, which has "
                f"{self._pool.frames.num_frames}: lower max_tokens, or enlarge --pool-memory"
            )

    def add(self, request: Request) -> None:
        """Queue a ``request`` that fits."""
        for kv in request.kvs:
            kv.reserve(self._models[kv.model_id].kv.num_pages(request.max_ids))
        self.waiting.push(request)
        self.deadlines.add(request)

    def schedule(self) -> list[Batch]:
        """The next step's batches, one a model that has rows; none when no request can run now."""
        self._settle_debt()
        budget = self._limits.max_batch_tokens
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
        while not self._obtain_pages(request.kv, num_tokens):
            if self._drop_lagging():
                continue
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _obtain_pages(self, kv: Kv, num_tokens: int) -> bool:
        need = self._pages_missing(kv, num_tokens)
        if need <= 0:
            return True
        frames = self._pool.obtain(need, Owner.KV)
        if frames is None:
            return False
        kv.add_frames(frames)
        return True

    def _pages_missing(self, kv: Kv, num_tokens: int) -> int:
        num_pages = self._models[kv.model_id].kv.num_pages(kv.num_computed + num_tokens)
        return num_pages - kv.num_pages

    def _drop_lagging(self) -> bool:
        """Of the newest request that has something on the model that does not serve it now, that
        goes: it costs nobody a step unless the request moves back. False if there is none."""
        for request in reversed(self.running):
            if request.lagging is not None and request.lagging.num_pages:
                self._pool.prefix.release(request.lagging.take_frames())
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
            freed += self._pool.prefix.release(kv.take_frames(), keep=keep)
        for adapters, digest in self._worn(request):
            adapters.release(digest)
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
        with closing(self.waiting.walk()) as line:
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
        num_hit = self._take_cached_pages(request)
        num_tokens = min(request.num_pending, budget)
        # One page for each row that runs, so that admitting does not mean preempting next step.
        need = self._pages_missing(request.kv, num_tokens)
        short = self.running and need + len(self.running) > self._pool.num_available
        if short or not self._obtain_pages(request.kv, num_tokens):
            self._pool.prefix.release(request.kv.take_frames())
            return Wait.FRAMES
        self._enter(request, num_hit)
        return Row(request, num_tokens)

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

    def _take_cached_pages(self, request: Request) -> int:
        """Start ``request`` from what the prefix cache has of its beginning: so many tokens.

        At least the last id is always computed: its logits are wanted. A request that asks for
        its prompt's log-probabilities computes everything.
        """
        kv = request.kv
        hits = self._pool.prefix.match(self._reusable(request))
        kv.add_frames(hits)
        kv.num_shared = len(hits)
        kv.num_computed = len(hits) * self._models[kv.model_id].kv.page_tokens
        return kv.num_computed

    def _reusable(self, request: Request) -> list[bytes]:
        """Keys of the pages that ``request`` takes if they are cached."""
        if not self._limits.prefix_caching or request.wants_prompt_logprobs:
            return []
        page_tokens = self._models[request.kv.model_id].kv.page_tokens
        return self._keys(request, (request.num_ids - 1) // page_tokens)

    def _num_cached(self, request: Request) -> int:
        """How many tokens of ``request`` are cached now."""
        num_pages = self._pool.prefix.num_cached(self._reusable(request))
        return num_pages * self._models[request.kv.model_id].kv.page_tokens

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

    def _out_of_patience(self, request: Request, why: Wait) -> bool:
        passed = self._passed_over.get(request.id, 0) + (why is Wait.FRAMES)
        self._passed_over[request.id] = passed
        return passed > PATIENCE_STEPS

    def _settle_debt(self) -> None:
        """When every seat is taken and someone has had far more than the one who waits, the
        newest row of the most served key makes room."""
        head = self.waiting.head()
        if head is None or len(self.running) < self._limits.max_num_seqs:
            return
        served = self.waiting.served
        richest = max(self.running, key=lambda r: served[r.fair_key])
        debt = served[richest.fair_key] - served[head.fair_key]
        if debt <= self._limits.fairness_debt_tokens:
            return
        missing = [(a, digest) for a, digest in self._worn(head) if not a.is_resident(digest)]
        if missing:
            try:
                for adapters, digest in missing:
                    adapters.load(digest)
            except LoramuxError as error:
                self.counts.failed.append((head, error))
            return
        newest = next(r for r in reversed(self.running) if r.fair_key == richest.fair_key)
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
        return self._limits.max_batch_tokens - sum(batch.num_tokens for batch in batches)

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
        if self._obtain_pages(row.kv, row.num_tokens + len(token_ids)):
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
            if self._limits.prefix_caching:
                self._cache_full_pages(request)
            if request.follow_router() and request.kv.num_pages == 0:
                self._take_cached_pages(request)  # of another's, or its own that went at need

    def _cache_full_pages(self, request: Request) -> None:
        full = request.kv.num_computed // self._models[request.kv.model_id].kv.page_tokens
        if full == request.kv.num_shared:
            return
        keys = self._keys(request, full)
        for page in range(request.kv.num_shared, full):
            self._pool.prefix.insert(keys[page], int(request.kv.page_table[page]))
        request.kv.num_shared = full

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
