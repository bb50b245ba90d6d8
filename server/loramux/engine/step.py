"""One step: schedule -> draft -> forward -> sample -> commit. All else is a detail of one of them.

Where a device computes by itself, a step stays on its way until the next one is planned:

    device  |  forward, sample t  |   forward, sample t + 1  |
    host       plan t + 1 | commit t, launch t + 1 | plan t + 2 |

A plan takes every row that is on its way to go on. One that ends with the token it then gets is
taken out of the plan again before that is launched, so nothing is ever computed in vain.

Every model that has rows in a step computes them in a batch of its own, one after the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loramux.adapters.residency import Residency
from loramux.batch import Batch, Row
from loramux.engine.counted import counted, is_judged
from loramux.engine.models import Partner
from loramux.engine.pace import StepPace
from loramux.engine.scheduler import Counts, Scheduler
from loramux.errors import Overloaded
from loramux.memory.shortage import is_shortage
from loramux.metrics.stats import StepStats
from loramux.model.runner import ModelRunner, Plan, Scored
from loramux.request import BASE_MODEL_ID, FinishReason, Request, Status
from loramux.sampling.logprobs import logprobs
from loramux.sampling.sampler import Sampler, SampleResult
from loramux.speculation.costs import Load
from loramux.speculation.drafter import Ask
from loramux.speculation.drafting import Drafting
from loramux.wire import Failed, Finished, Output, TokenLogprob

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What one step produced. ``ended`` are the requests that had their terminal event."""

    outputs: list[Output] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    stats: StepStats = field(default_factory=StepStats)


@dataclass(frozen=True)
class Flight:
    """A batch that was launched: ``result`` waits for what its rows sampled."""

    plan: Plan
    scored: Scored
    result: Callable[[], SampleResult]
    began: float


class StepLoop:
    """Steps a scheduler's requests through a model. ``overlap``: plan a step while the one before
    it is computed; a step's results then come with the next call. ``batches``: the last step's."""

    def __init__(
        self,
        scheduler: Scheduler,
        residency: Residency,
        runner: ModelRunner,
        sampler: Sampler,
        drafting: Drafting,
        partners: Mapping[int, Partner],
        clock: Callable[[], float],
        *,
        overlap: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._runner = runner
        self._sampler = sampler
        self._drafting = drafting
        self._partners = partners
        self._clock = clock
        self._overlap = overlap
        self._flights: list[Flight] = []
        self._pace = StepPace(drafting.planner.costs if drafting.planner is not None else None)
        self.predicted_s = 0.0
        self.on_running: Callable[[Sequence[str]], None] = lambda _: None
        self.batches: list[Batch] = []

    def step(self) -> Report:
        """Launch every row that can run once, and commit what came of those before."""
        report = Report()
        timer = _PhaseTimer()
        self._residency.poll()
        for partner in self._partners.values():
            partner.residency.poll()
        self._expire(report)
        if any(
            row.request.speculation is not None or row.request.router is not None
            for flight in self._flights
            for row in flight.plan.batch.rows
        ):
            self._computing(())
            self._land(report, timer)  # who guesses, or may move, must know the last token
            self.on_running(())
        batches = self._scheduler.schedule()
        self._computing(batches)
        for batch in batches:
            self._draft(batch, self._scheduler.budget_for_drafts(batches), report)
        self.batches = batches
        plans = [plan for batch in batches if (plan := self._plan(batch, report))]
        timer.done("schedule")
        self._land(report, timer)
        for whole in plans:
            if plan := self._without_ended(whole):
                self._launch(plan, report, timer)
        if not self._overlap:
            self._land(report, timer)
        self.on_running(())
        self._report_failures(report)
        report.stats.phase_s = timer.phase_s
        return report

    def _computing(self, batches: Sequence[Batch]) -> None:
        """From here on it is for these, and for what is on its way, if this goes wrong."""
        batches = [*(flight.plan.batch for flight in self._flights), *batches]
        self.on_running(
            list(dict.fromkeys(row.request.id for batch in batches for row in batch.rows))
        )
        self.predicted_s = sum(self._pace.predict(batch.num_tokens) for batch in batches)

    def _runner_of(self, model_id: int) -> ModelRunner:
        return self._runner if model_id == BASE_MODEL_ID else self._partners[model_id].runner

    def _plan(self, batch: Batch, report: Report) -> Plan | None:
        try:
            return self._runner_of(batch.model_id).plan(batch)
        except Exception as error:
            self._shed(batch, self.batches, error, report)
            return None

    def _without_ended(self, plan: Plan) -> Plan | None:
        """``plan``, or one without the rows that ended since it was made."""
        if all(row.request.status is Status.RUNNING for row in plan.batch.rows):
            return plan
        batch = plan.batch
        rows = [row for row in batch.rows if row.request.status is Status.RUNNING]
        return (
            self._runner_of(batch.model_id).plan(Batch.of(batch.model_id, rows)) if rows else None
        )

    def _launch(self, plan: Plan, report: Report, timer: _PhaseTimer) -> None:
        timer.done("schedule")
        batch, began = plan.batch, time.perf_counter()
        try:
            scored = self._runner_of(batch.model_id).forward(plan)
            timer.done("forward")
            result = self._sample(batch, scored)
            timer.done("sample")
        except Exception as error:
            self._shed(batch, self.batches, error, report)
            return
        self._count(report.stats, batch)
        self._scheduler.launched(batch)
        self._flights.append(Flight(plan, scored, result, began))

    def _shed(self, batch: Batch, step: Sequence[Batch], error: Exception, report: Report) -> None:
        """There was no memory for a ``batch`` of a ``step``, of which nothing has happened yet: its
        rows are tried again, in smaller steps. Who finds none for one token, and nobody beside it,
        is failed. Raises ``error`` if it says something else."""
        if not is_shortage(error):
            raise error
        report.stats.shortages += 1
        num_tokens = sum(each.num_tokens for each in step)
        log.error("no memory for a step of %d tokens: %s", num_tokens, error)
        self._scheduler.room.too_large(num_tokens)
        if num_tokens == 1 and batch.rows[0].request.status is not Status.DONE:
            message = "the device has no memory for this request, even alone"
            self._fail(batch.rows[0].request, Overloaded.code, message, report)

    def _draft(self, batch: Batch, budget: int, report: Report) -> None:
        """Have rows that decode guess ahead, for their one forward pass to verify."""
        rows = [row for row in batch.rows if row.num_tokens == 1 and row.request.speculation]
        if not rows or not self._scheduler.room.guesses:
            return
        load = Load(
            rows=sum(row.samples for row in batch.rows),
            tokens=batch.num_tokens,
            budget=budget,
        )
        if self._drafting.rests(load):
            return
        asks = [Ask(row.request, self._scheduler.room_for_drafts(row)) for row in rows]
        try:
            drafts = self._drafting.propose(asks, load)
        except Exception as error:
            if not is_shortage(error):
                raise
            report.stats.shortages += 1
            log.warning("no memory for guesses: %s", error)
            self._scheduler.room.no_guesses()
            return
        for row, draft in zip(rows, drafts, strict=True):
            if draft is not None:
                self._scheduler.draft(row, draft.drafter, *draft.guess)

    def _sample(self, batch: Batch, scored: Scored) -> Callable[[], SampleResult]:
        """One token for each row that reached its last id, and one behind each guess; prompt
        log-probs on the way."""
        for index, line in scored.prompt:
            _collect_prompt_logprobs(batch.rows[index], scored.logits[line:])
        rows: list[tuple[str, int]] = []
        guessed: dict[int, Sequence[int]] = {}
        judged: list[tuple[int, int]] = []
        for row in batch.rows:
            if row.samples:
                first = row.request.num_outputs
                if row.drafts and is_judged(row.request):
                    parents = range(len(row.drafts)) if row.parents is None else row.parents
                    judged += zip([len(rows) + node for node in parents], row.drafts, strict=True)
                rows.append((row.request.id, first))
                for ahead in row.guessed() if row.drafts else ():
                    guessed[len(rows)] = ahead
                    rows.append((row.request.id, first + len(ahead)))
        logits = scored.logits[scored.sampling] if scored.prompt else scored.logits
        return self._sampler.start(logits, rows, guessed, judged)

    def _land(self, report: Report, timer: _PhaseTimer) -> None:
        """Wait for the step that is on its way, and commit it."""
        flights, self._flights = self._flights, []
        for flight in flights:
            try:
                result = flight.result()
            except Exception as error:
                self._scheduler.take_back(flight.plan.batch)
                those = [other.plan.batch for other in flights]
                self._shed(flight.plan.batch, those, error, report)
                continue
            timer.done("sample")
            seconds = time.perf_counter() - flight.began
            self._pace.took(flight.plan.batch.num_tokens, seconds)
            if flight.plan.batch.model_id == BASE_MODEL_ID:
                self._residency.pace.took(seconds)
            self._commit(flight, result, report)
            self._scheduler.room.stepped()
            timer.done("commit")
        if flights:
            took = time.perf_counter() - flights[0].began
            self._scheduler.deadlines.took(took)
            self._drafting.stepped(alone=len(flights) == 1)

    def _commit(self, flight: Flight, result: SampleResult, report: Report) -> None:
        now, batch = self._clock(), flight.plan.batch
        outputs: list[Output] = []
        sampled: list[list[int]] = []
        broken: list[Request] = []
        read: dict[int, Request] = {}
        kept: dict[int, list[int]] = {}
        for index, (row, drew) in enumerate(counted(batch.rows, flight.scored, result)):
            sampled.append(drew.token_ids if drew else [])
            if drew is None:
                continue
            if drew.broken:
                broken.append(row.request)
            if row.drafts:
                num_right = max(0, len(drew.nodes) - 1)
                report.stats.count_drafts(row.drafter, len(row.drafts), num_right)
                row.request.num_drafted += len(row.drafts)
                row.request.num_accepted += num_right
                self._drafting.learned(row, drew.nodes[1:])
            if row.parents is not None:
                kept[index] = drew.nodes
            if drew.token_ids:
                outputs.append(self._output(row, drew.token_ids, drew.logprobs, now))
                reads = batch.model_id == BASE_MODEL_ID and not drew.broken
                if reads and self._drafting.reads(row.request):
                    read[drew.line] = row.request
        if kept:
            self._runner_of(batch.model_id).compact(flight.plan, kept)
        report.outputs += outputs
        report.stats.generation_tokens += sum(len(output.token_ids) for output in outputs)
        for request in broken:  # first, so that its pages are never offered to others
            self._fail_broken(request, report)
        self._scheduler.commit(batch, sampled)
        for output in outputs:
            self._sampler.commit(output.request_id, output.token_ids)
        if read:
            self._show(list(read.values()), flight.scored, list(read), report)
        self._finish(batch, report)

    def _show(
        self, requests: list[Request], scored: Scored, lines: list[int], report: Report
    ) -> None:
        """Those who guess from states get the ones at ``lines``; without them they say nothing."""
        try:
            self._drafting.saw(requests, scored.hidden[scored.sampling[lines]])
        except Exception as error:
            if not is_shortage(error):
                raise
            report.stats.shortages += 1
            self._scheduler.room.no_guesses()

    @staticmethod
    def _output(
        row: Row, token_ids: list[int], logprobs: list[TokenLogprob | None], now: float
    ) -> Output:
        request = row.request
        output = Output(request.id, request.num_outputs - 1, token_ids)
        if logprobs[0] is not None:
            output.logprobs = [logprob for logprob in logprobs if logprob is not None]
        if request.first_sampled is None:
            request.first_sampled = now
            output.started = _start(request)
        if row.drafts:
            output.drafted = (row.drafter, len(row.drafts), row.depth)
        if request.router is not None:
            output.resume, output.ledger = request.router.state, request.router.ledger
        return output

    def _finish(self, batch: Batch, report: Report) -> None:
        outputs = {output.request_id: output for output in report.outputs}
        for row in batch.rows:
            request = row.request
            if request.status is Status.DONE:
                continue
            if (output := outputs.get(request.id)) is None:
                # With max_tokens 0 only the prompt was asked for, and now it is computed.
                if request.num_pending == 0 and request.num_ids == request.max_ids:
                    if None in request.prompt_logprobs[1:]:  # not finite
                        self._fail_broken(request, report)
                        continue
                    output = Output(request.id, 0, [], prompt_logprobs=request.prompt_logprobs)
                    if request.router is not None:
                        output.ledger = request.router.ledger
                    report.outputs.append(output)
                    self._end(request, "length", None, report)
                continue
            if output.start_index == 0 and request.sampling.prompt_logprobs is not None:
                output.prompt_logprobs = request.prompt_logprobs
            if output.token_ids[-1] in request.sampling.stop_token_ids:
                self._end(request, "stop", output.token_ids[-1], report)
            elif request.num_ids == request.max_ids:
                self._end(request, "length", None, report)

    def _end(
        self, request: Request, reason: FinishReason, stop_token_id: int | None, report: Report
    ) -> None:
        self._scheduler.finish(request)
        report.ended.append(request)
        cached_tokens, queue_s, prefill_s = _start(request)
        report.finished.append(
            Finished(
                request.id,
                reason,
                stop_token_id,
                cached_tokens=cached_tokens,
                queue_s=queue_s,
                prefill_s=prefill_s,
            )
        )

    def _fail_broken(self, request: Request, report: Report) -> None:
        """Its logits are not finite. What else was computed of it may not be either, and 0 * NaN is
        NaN: nobody shall find that in a frame, not even behind the end of what is written there."""
        report.stats.nan_aborts += 1
        freed = self._fail(
            request, "numerical_error", "the model produced no finite logits", report
        )
        self._runner.wipe(freed)

    def _fail(
        self, request: Request, code: str, message: str, report: Report, *, keep: bool = False
    ) -> list[int]:
        freed = self._scheduler.finish(request, keep=keep)
        report.ended.append(request)
        report.failed.append(Failed(request.id, code, message))
        return freed

    def _expire(self, report: Report) -> None:
        if not self._scheduler.running:
            self._scheduler.deadlines.rest()
        for request in self._scheduler.deadlines.expired(self._clock()):
            message = "the request's deadline passed"
            self._fail(request, "deadline_exceeded", message, report, keep=True)
        for request in self._scheduler.deadlines.late(self._clock()):
            if request.status is not Status.DONE:
                self._fail(request, "overloaded", "its first token would come too late", report)

    def _report_failures(self, report: Report) -> None:
        counts, self._scheduler.counts = self._scheduler.counts, Counts()
        for request, error in counts.failed:
            if request.status is not Status.DONE:  # one is told of as often as it was tried
                self._fail(request, error.code, error.message, report)
        report.stats.preemptions = counts.preemptions
        report.stats.prefix_queries = counts.prefix_queries
        report.stats.prefix_hits = counts.prefix_hits

    @staticmethod
    def _count(stats: StepStats, batch: Batch) -> None:
        stats.batch_rows += len(batch.rows)
        stats.batch_tokens += batch.num_tokens
        stats.batch_adapters += batch.num_adapters
        stats.prompt_tokens += sum(
            min(row.num_tokens, max(row.request.num_prompt - row.kv.num_computed, 0))
            for row in batch.rows
        )


def _start(request: Request) -> tuple[int, float, float]:
    """Prompt tokens found in the cache, seconds it waited, seconds until its first token."""
    scheduled = request.first_scheduled or request.arrival
    sampled = request.first_sampled or scheduled
    return request.num_cached or 0, scheduled - request.arrival, sampled - scheduled


def _collect_prompt_logprobs(row: Row, logits: torch.Tensor) -> None:
    """Add what ``row`` computed: line i of ``logits`` predicts the id after its i-th token."""
    request = row.request
    collected = request.prompt_logprobs
    if not collected:
        collected.append(None)  # nothing comes before the first id
    first = row.kv.num_computed + 1
    stop = min(first + row.num_tokens, request.num_prompt)
    # A row recomputed after a preemption has the beginning already.
    start = max(first, len(collected))
    if start < stop:
        num = [request.sampling.prompt_logprobs or 0] * (stop - start)
        ids = request.ids[start:stop].tolist()
        collected += logprobs(logits[start - first : stop - first], ids, num)


class _PhaseTimer:
    """Wall-clock seconds up to the calls of ``done``, by name."""

    def __init__(self) -> None:
        self.phase_s: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self.phase_s[phase] = self.phase_s.get(phase, 0.0) + now - self._last
        self._last = now
