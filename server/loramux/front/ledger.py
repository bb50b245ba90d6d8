"""The unfinished requests: what was asked, what was delivered, and their one terminal event."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from loramux import errors
from loramux.errors import DeadlineExceeded, EngineFailed, LoramuxError, Overloaded
from loramux.front.detokenizer import TextStream
from loramux.front.drafts import Drafted
from loramux.front.generation import Delta, Done, Generation, GenerationSpec
from loramux.front.observations import Observations
from loramux.request import BASE_MODEL_ID, FinishReason
from loramux.wire import Failed, Finished, Output, StepDone, Submit

log = logging.getLogger(__name__)

_ERRORS: dict[str, type[LoramuxError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidRequest,
        errors.ContextLengthExceeded,
        errors.RequestTooLarge,
        errors.NotFound,
        errors.Conflict,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.EngineFailed,
        errors.NumericalError,
        errors.AdapterLoadFailed,
    )
}
UNREADABLE = {errors.AdapterLoadFailed.code, "packed_file_invalid"}
"""What the engine says of a packed file that is missing, damaged or cut short."""


class Entry:
    """One unfinished choice: enough to submit it again, and its stream to the client."""

    __slots__ = (
        "by_model",
        "drafts",
        "first_token_at",
        "generation",
        "last_token_at",
        "output_ids",
        "resume",
        "spec",
        "started",
        "text",
    )

    def __init__(self, spec: GenerationSpec, generation: Generation, text: TextStream) -> None:
        self.spec = spec
        self.generation = generation
        self.text = text
        self.output_ids: list[int] = []
        self.resume: bytes | None = None
        self.started: tuple[int, float, float] | None = None
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.drafts: dict[str, Drafted] = {}
        self.by_model: tuple[int, int, int, int] | None = None

    @property
    def deadline(self) -> float | None:
        """``time.monotonic()`` when its time is over."""
        spec = self.spec
        return None if spec.deadline_s is None else spec.arrived_at + spec.deadline_s

    def submission(self, now: float) -> Submit:
        """What to tell an engine, from where the choice is ``now``."""
        spec, sampling = self.spec, self.spec.sampling
        if self.output_ids and sampling.prompt_logprobs is not None:
            # They came with the first token; asked for again, the prompt could not be cached.
            sampling = replace(sampling, prompt_logprobs=None)
        return Submit(
            request_id=spec.request_id,
            tenant=spec.tenant,
            model_id=BASE_MODEL_ID,
            adapters=spec.adapters,
            prompt_ids=spec.prompt_ids,
            sampling=sampling,
            output_ids=self.output_ids,
            cache_salt=spec.cache_salt,
            resume=self.resume,
            speculation=spec.speculation,
            entropy=spec.entropy,
            companions=dict(spec.companions),
            deadline_s=None if self.deadline is None else self.deadline - now,
            pool_share=spec.pool_share,
        )


class Ledger:
    """Every unfinished choice by request id.

    Outputs count only at the position where the delivered ones end. A choice leaves the ledger with
    its terminal event, so there is exactly one; until then its adapters' files are held, and those
    of their companions (``retain``/``release`` of their digests). ``ended`` hears of every terminal
    event how many tokens were delivered before it, ``unreadable`` of adapters that the engine could
    not load. ``retry_after_s`` says when so many choices that the engine refused should come back.
    """

    def __init__(
        self,
        observations: Observations,
        retain: Callable[[str], None],
        release: Callable[[str], None],
        ended: Callable[[GenerationSpec, int], None],
        unreadable: Callable[[str], None] = lambda _: None,
        retry_after_s: Callable[[int], float] = lambda _: 1.0,
    ) -> None:
        self._entries: dict[str, Entry] = {}
        self._observations = observations
        self._retain = retain
        self._release = release
        self._ended = ended
        self._unreadable = unreadable
        self._retry_after_s = retry_after_s

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __getitem__(self, request_id: str) -> Entry:
        return self._entries[request_id]

    def unfinished(self) -> list[Entry]:
        """Every unfinished choice, in the order in which they were accepted."""
        return list(self._entries.values())

    def add(self, spec: GenerationSpec, generation: Generation, text: TextStream) -> Entry:
        """A choice was accepted. Its request id is new: ids are the server's own."""
        assert spec.request_id not in self._entries, "request ids are unique"
        self._entries[spec.request_id] = entry = Entry(spec, generation, text)
        for digest in spec.digests:
            self._retain(digest)
        return entry

    def apply(self, step: StepDone) -> list[str]:
        """Take in one step of the current engine. Returns the requests it should abort: they ended
        here first."""
        now = time.monotonic()
        finished = {event.request_id: event for event in step.finished}
        aborts = []
        for output in step.outputs:
            entry = self._entries.get(output.request_id)
            if entry is None:  # ended here before the engine heard of the abort
                continue
            ended_by_engine = finished.get(output.request_id)
            if not self._append(entry, output, ended_by_engine, now) and ended_by_engine is None:
                aborts.append(output.request_id)
        for event in step.finished:
            if entry := self._entries.get(event.request_id):
                self._finish(entry, event, now)
        for failure in step.failed:
            if entry := self._entries.get(failure.request_id):
                error = _error_of(failure)
                if isinstance(error, Overloaded):
                    error.retry_after_s = self._retry_after_s(1)
                self.fail(failure.request_id, error)
                if failure.code in UNREADABLE:
                    for digest in entry.spec.digests:
                        self._unreadable(digest)
        return aborts

    def _append(self, entry: Entry, output: Output, last: Finished | None, now: float) -> bool:
        """Deliver one Output; False when that ended the choice here."""
        expected = len(entry.output_ids)
        if output.start_index < expected:
            log.warning(
                "%s: dropped tokens at %d, %d are delivered already",
                output.request_id,
                output.start_index,
                expected,
            )
            return True
        if output.start_index > expected:
            self.fail(
                output.request_id,
                EngineFailed(
                    f"the engine skipped from token {expected} to {output.start_index} of a request"
                ),
            )
            return False
        spec, ids, logprobs = entry.spec, output.token_ids, output.logprobs
        hidden = 0
        if last is not None and last.stop_token_id is not None and not spec.include_stop:
            hidden = 1  # the token that ended it is no text, as with a stop string
        text, used = entry.text.feed(ids[: len(ids) - hidden])
        if entry.text.matched is None:
            used = len(ids)
        else:
            ids, logprobs = ids[:used], logprobs[:used] if logprobs is not None else None
        entry.output_ids += ids
        entry.resume = output.resume
        if entry.started is None:  # an engine that goes on with it says its own
            entry.started = output.started
        if output.drafted is not None:
            self._count_drafts(entry, output.drafted, min(used, len(output.token_ids) - 1))
        if output.ledger is not None:
            self._count_models(entry, output.ledger, len(output.token_ids) - used)
        if text or ids or output.prompt_logprobs is not None:
            entry.generation.deliver(Delta(text, list(ids), logprobs, output.prompt_logprobs))
        if used:
            self._observations.tokens(spec, used, entry.first_token_at, entry.last_token_at, now)
            entry.last_token_at = now
            if entry.first_token_at is None:
                entry.first_token_at = now
        if entry.text.matched is not None:
            self._end(entry, "stop", entry.text.matched, last, now)
            return False
        return True

    def _count_drafts(self, entry: Entry, drafted: tuple[str, int, int], accepted: int) -> None:
        drafter, num, depth = drafted
        if (counts := entry.drafts.get(drafter)) is None:
            counts = entry.drafts[drafter] = Drafted()
        counts.add(num, accepted)
        self._observations.drafted(entry.spec, drafter, num, depth, accepted)

    def _count_models(self, entry: Entry, ledger: tuple[int, int, int, int], cut: int) -> None:
        """``cut`` tokens of the one model that has just made some lie behind a stop string."""
        large, small, computed_large, computed_small = ledger
        were_large, were_small, *_ = entry.by_model or (0, 0, 0, 0)
        if large > were_large:
            large -= cut
        else:
            small -= cut
        entry.by_model = (large, small, computed_large, computed_small)
        self._observations.by_model(large - were_large, small - were_small)

    def _finish(self, entry: Entry, event: Finished, now: float) -> None:
        reason, stop_reason = event.reason, event.stop_token_id
        if rest := entry.text.finish():
            entry.generation.deliver(Delta(rest))
        if entry.text.matched is not None:  # by the U+FFFD of a last, incomplete character
            self._end(entry, "stop", entry.text.matched, event, now)
        else:
            self._end(entry, reason, stop_reason, event, now)

    def cancel(self, request_id: str) -> bool:
        """The client left. False when the choice had ended already."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        self._end(entry, "abort", None, None, time.monotonic())
        return True

    def expire(self, now: float) -> list[str]:
        """End the choices whose time is over, whether an engine has them or not; which those are.
        An engine that has them looks oftener."""
        late = [
            request_id
            for request_id, entry in self._entries.items()
            if entry.deadline is not None and entry.deadline < now
        ]
        for request_id in late:
            self.fail(request_id, DeadlineExceeded("the request's deadline passed"))
        return late

    def fail(self, request_id: str, error: LoramuxError) -> None:
        """End an unfinished choice with an error."""
        entry = self._remove(request_id)
        entry.generation.end(error)
        self._observations.failed(entry.spec, error)

    def fail_all(self, error: LoramuxError) -> None:
        """Every unfinished choice ends with ``error``."""
        for request_id in list(self._entries):
            self.fail(request_id, error)

    def _end(
        self,
        entry: Entry,
        reason: FinishReason,
        stop_reason: str | int | None,
        event: Finished | None,
        now: float,
    ) -> None:
        self._remove(entry.spec.request_id)
        started = entry.started
        if started is None and event is not None:
            started = (event.cached_tokens, event.queue_s, event.prefill_s)
        cached_tokens, queue_s, prefill_s = started or (0, 0.0, 0.0)
        done = Done(
            finish_reason=reason,
            stop_reason=stop_reason,
            num_output_tokens=len(entry.output_ids),
            cached_tokens=cached_tokens,
            queue_s=queue_s,
            prefill_s=prefill_s,
            first_token_at=entry.first_token_at,
            finished_at=now,
            drafts=entry.drafts,
            by_model=entry.by_model,
        )
        entry.generation.end(done)
        self._observations.finished(entry.spec, done)

    def _remove(self, request_id: str) -> Entry:
        entry = self._entries.pop(request_id)
        for digest in entry.spec.digests:
            self._release(digest)
        self._ended(entry.spec, len(entry.output_ids))
        return entry


def _error_of(failure: Failed) -> LoramuxError:
    kind = _ERRORS.get(failure.code)
    if kind is None:
        return EngineFailed(failure.message, code=failure.code)
    error = kind(failure.message)
    error.param = failure.param
    return error
