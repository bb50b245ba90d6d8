"""What the front knows of itself: the newest engine statistics, running totals, and events.

Plain data; exporters read ``Snapshot`` and may watch single events as an ``Observer``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from loramux.errors import LoramuxError
from loramux.front.drafts import DraftTotals
from loramux.front.faults import AdapterFaults
from loramux.front.generation import Done, GenerationSpec
from loramux.metrics.stats import StepStats


class Observer(Protocol):
    """Called synchronously on the event loop: methods must be quick and must not raise."""

    def rejected(self, code: str) -> None:
        """Admission said no; ``code`` is the error's code or a reason such as ``draining``."""

    def submitted(self, spec: GenerationSpec) -> None:
        """A choice was accepted."""

    def first_token(self, spec: GenerationSpec, seconds: float) -> None:
        """The first token arrived, ``seconds`` after the request did."""

    def more_tokens(self, spec: GenerationSpec, num_tokens: int, seconds: float) -> None:
        """Later tokens arrived together, ``seconds`` after the ones before."""

    def finished(self, spec: GenerationSpec, done: Done) -> None:
        """The good terminal event ("abort" included)."""

    def failed(self, spec: GenerationSpec, error: LoramuxError) -> None:
        """The bad terminal event."""

    def step(self, stats: StepStats) -> None:
        """The engine finished a step."""

    def uploaded(self, result: str) -> None:
        """An upload ended: ``ready`` or the code of its refusal."""

    def validated(self, seconds: float, code: str) -> None:
        """The ingest process examined an adapter; ``code`` of what is wrong with it, or ""."""

    def engine_restarted(self, reason: str) -> None:
        """The engine died (``exit``, ``heartbeat``, ``step_timeout``), or was wrong (``canary``):
        it is started again."""


@dataclass
class Snapshot:
    """Newest values and totals since the front started; read it, do not write it.

    ``wearers`` are the tenants whose requests have used what is resident now, by digest. ``stats``
    is the newest StepStats (read ``resident``, ``pinned`` and ``waiting_adapters`` here:
    a message may leave them out). Totals survive engine restarts. ``adapter_tokens`` maps a
    digest ("" for the base) to [prompt, generation] tokens of finished requests and is bounded:
    digests beyond the first 1000 are added up under "other". ``recent_loads`` are the begin and end
    (``time.monotonic()``, as the front heard of it) of the last load of each of the last 1000
    digests that were loaded. ``model_tokens`` are output tokens of
    entropy-adaptive requests by model.
    """

    stats: StepStats = field(default_factory=StepStats)
    resident: frozenset[str] = frozenset()
    wearers: dict[str, set[str]] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    waiting_adapters: tuple[str, ...] = ()
    engine_epoch: int = 0
    engine_restarts: int = 0
    resumed: int = 0
    canary_misses: int = 0
    nan_aborts: int = 0
    shortages: int = 0
    steps: int = 0
    unfinished: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_load_bytes: int = 0
    adapter_load_s: float = 0.0
    recent_loads: dict[str, tuple[float, float]] = field(default_factory=dict)
    arrival_wait_s: float = 0.0
    evictions: dict[str, int] = field(default_factory=dict)
    adapter_evictions: dict[str, int] = field(default_factory=dict)
    phase_s: dict[str, float] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, int] = field(default_factory=dict)
    adapter_tokens: dict[str, list[int]] = field(default_factory=dict)
    drafts: DraftTotals = field(default_factory=DraftTotals)
    model_tokens: dict[str, int] = field(default_factory=dict)
    adapter_faults: AdapterFaults = field(default_factory=AdapterFaults)


_MOST_DIGESTS = 1000


class Observations:
    """Counts every event in ``snapshot`` and passes it on to ``observer``."""

    def __init__(self, observer: Observer | None = None) -> None:
        self.observer = observer
        self.snapshot = Snapshot()

    def rejected(self, code: str) -> None:
        """See Observer."""
        _count(self.snapshot.rejected, code)
        if self.observer:
            self.observer.rejected(code)

    def submitted(self, spec: GenerationSpec) -> None:
        """See Observer."""
        self.snapshot.unfinished += 1
        self._wears(spec)
        if self.observer:
            self.observer.submitted(spec)

    def _wears(self, spec: GenerationSpec) -> None:
        for digest in spec.digests:
            self.snapshot.wearers.setdefault(digest, set()).add(spec.tenant)

    def tokens(
        self, spec: GenerationSpec, num: int, first_at: float | None, last_at: float, now: float
    ) -> None:
        """Tokens were delivered; ``first_at`` is None when these are the first."""
        if self.observer is None:
            return
        if first_at is None:
            self.observer.first_token(spec, now - spec.arrived_at)
            num, last_at = num - 1, now
        if num:
            self.observer.more_tokens(spec, num, now - last_at)

    def drafted(
        self, spec: GenerationSpec, drafter: str, num: int, depth: int, accepted: int
    ) -> None:
        """``num`` guesses, ``depth`` tokens ahead, were verified: the first ``accepted`` tokens of
        them were right, and delivered."""
        digest = spec.adapters[0].digest if spec.adapters else ""
        self.snapshot.drafts.add(digest, drafter, num, depth, accepted)

    def by_model(self, large: int, small: int) -> None:
        """Tokens of an entropy-adaptive request were delivered."""
        _count(self.snapshot.model_tokens, "large", large)
        _count(self.snapshot.model_tokens, "small", small)

    def finished(self, spec: GenerationSpec, done: Done) -> None:
        """See Observer."""
        snapshot = self.snapshot
        snapshot.unfinished -= 1
        _count(snapshot.finished, done.finish_reason)
        digest = spec.adapters[0].digest if spec.adapters else ""
        if digest not in snapshot.adapter_tokens and len(snapshot.adapter_tokens) >= _MOST_DIGESTS:
            digest = "other"
        tokens = snapshot.adapter_tokens.setdefault(digest, [0, 0])
        tokens[0] += len(spec.prompt_ids)
        tokens[1] += done.num_output_tokens
        if self.observer:
            self.observer.finished(spec, done)

    def failed(self, spec: GenerationSpec, error: LoramuxError) -> None:
        """See Observer."""
        self.snapshot.unfinished -= 1
        _count(self.snapshot.failed, error.code)
        self.snapshot.adapter_faults.failed(spec, error)
        if self.observer:
            self.observer.failed(spec, error)

    def uploaded(self, result: str) -> None:
        """See Observer."""
        _count(self.snapshot.uploads, result)
        if self.observer:
            self.observer.uploaded(result)

    def validated(self, seconds: float, code: str) -> None:
        """See Observer."""
        if self.observer:
            self.observer.validated(seconds, code)

    def engine_started(self, epoch: int) -> None:
        """A new engine: what is resident is what it says from now on."""
        self.snapshot.engine_epoch = epoch
        self.snapshot.stats = StepStats()
        self.snapshot.resident = self.snapshot.pinned = frozenset()
        self.snapshot.waiting_adapters = ()
        self.snapshot.wearers.clear()

    def resumed(self, spec: GenerationSpec) -> None:
        """A new engine goes on with a choice that another had begun."""
        self.snapshot.resumed += 1
        self._wears(spec)

    def canary_missed(self) -> None:
        """The engine made another token of the canary's prompt than the first time."""
        self.snapshot.canary_misses += 1

    def engine_restarted(self, reason: str) -> None:
        """See Observer."""
        self.snapshot.engine_restarts += 1
        if self.observer:
            self.observer.engine_restarted(reason)

    def step(self, stats: StepStats) -> None:
        """Add one step's increments to the totals; see Observer."""
        snapshot = self.snapshot
        snapshot.stats = stats
        snapshot.steps += 1
        snapshot.prompt_tokens += stats.prompt_tokens
        snapshot.generation_tokens += stats.generation_tokens
        snapshot.prefix_queries += stats.prefix_queries
        snapshot.prefix_hits += stats.prefix_hits
        snapshot.preemptions += stats.preemptions
        snapshot.nan_aborts += stats.nan_aborts
        snapshot.shortages += stats.shortages
        for load in stats.loads:
            snapshot.adapter_loads += 1
            snapshot.adapter_load_bytes += load.num_bytes
            snapshot.adapter_load_s += load.seconds
            snapshot.recent_loads.pop(load.digest, None)
            now = time.monotonic()
            snapshot.recent_loads[load.digest] = (now - load.seconds, now)
            if len(snapshot.recent_loads) > _MOST_DIGESTS:
                del snapshot.recent_loads[next(iter(snapshot.recent_loads))]
        snapshot.arrival_wait_s += stats.arrival_wait_s
        for kind, num in stats.evictions.items():
            _count(snapshot.evictions, kind, num)
        for reason, num in stats.adapter_evictions.items():
            _count(snapshot.adapter_evictions, reason, num)
        for phase, seconds in stats.phase_s.items():
            snapshot.phase_s[phase] = snapshot.phase_s.get(phase, 0.0) + seconds
        if stats.resident is not None:
            resident = frozenset(stats.resident)
            for evicted in snapshot.resident - resident:
                snapshot.wearers.pop(evicted, None)
            snapshot.resident = resident
        if stats.pinned is not None:
            snapshot.pinned = frozenset(stats.pinned)
        if stats.waiting_adapters is not None:
            snapshot.waiting_adapters = tuple(stats.waiting_adapters)
        if self.observer:
            self.observer.step(stats)


def _count(counts: dict[str, int], key: str, num: int = 1) -> None:
    counts[key] = counts.get(key, 0) + num
