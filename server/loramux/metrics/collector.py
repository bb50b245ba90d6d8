"""Totals and newest values as metric families, read from the front when someone scrapes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from loramux import __version__
from loramux.metrics import buckets, drafts
from loramux.metrics.labels import OTHERS, adapter_label
from loramux.metrics.minute import MinuteCounts, MinuteLow
from loramux.metrics.stats import StepStats
from loramux.wire import Ready

TOP_ADAPTERS = 20

SEEDED = {
    "request_failed": (
        "engine_failed",
        "deadline_exceeded",
        "adapter_load_failed",
        "numerical_error",
    ),
    "admission_rejected": (
        "overloaded",
        "rate_limit_exceeded",
        "draining",
        "engine_starting",
        "engine_recovering",
        "engine_failed",
    ),
    "adapter_evictions": ("kv", "adapter", "removed"),
}
"""Shown from the start, at 0: PromQL's increase() does not see a series that begins at 1."""


class Faults(Protocol):
    """Which adapters broke requests (``front.faults.AdapterFaults``)."""

    def flagged(self) -> Iterable[tuple[str, int]]:
        """Digests, and how many requests each has broken."""


class Snapshot(Protocol):
    """The totals and newest values the front keeps (``front.observations.Snapshot``)."""

    stats: StepStats
    resident: frozenset[str]
    pinned: frozenset[str]
    waiting_adapters: tuple[str, ...]
    engine_restarts: int
    resumed: int
    canary_misses: int
    nan_aborts: int
    shortages: int
    steps: int
    unfinished: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    adapter_load_bytes: int
    arrival_wait_s: float
    evictions: dict[str, int]
    adapter_evictions: dict[str, int]
    finished: dict[str, int]
    failed: dict[str, int]
    rejected: dict[str, int]
    adapter_tokens: dict[str, list[int]]
    model_tokens: dict[str, int]

    @property
    def adapter_faults(self) -> Faults:
        """Who is flagged."""

    @property
    def drafts(self) -> drafts.Totals:
        """What became of guesses."""


class Source(Protocol):
    """The part of the front that is read."""

    base_name: str

    @property
    def snapshot(self) -> Snapshot:
        """Newest values."""

    @property
    def info(self) -> Ready | None:
        """What the engine said of itself."""

    def not_ready(self) -> list[str]:
        """Why no requests should come here now."""


class SnapshotCollector(Collector):
    """Turns the snapshot into metric families. ``collect`` runs on a thread, so it copies every
    dict first.

    ``submitted`` and ``stepped`` run on the event loop, and so does ``read``, which has to come
    before every ``collect``: what changes with every event is added up there. ``clock``:
    ``time.monotonic``, as in the requests' ``arrived_at``.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._names: Mapping[str, Sequence[str]] = {}
        self._asked = MinuteCounts(clock)
        self._free, self._available = MinuteLow(clock), MinuteLow(clock)
        self._waiting_since: float | None = None
        self._read: list[Metric] = []

    def submitted(self, digests: Iterable[str]) -> None:
        """A choice was accepted that names these adapters."""
        for digest in digests:
            self._asked.add(digest)

    def stepped(self, stats: StepStats) -> None:
        """The engine told of itself."""
        pool = stats.pool
        self._free.note(pool.free)
        self._available.note(pool.free + pool.prefix + pool.adapter_warm)
        if not stats.num_waiting:
            self._waiting_since = None
        elif stats.oldest_waiting_s is not None:
            self._waiting_since = self._clock() - stats.oldest_waiting_s

    def read(self, names: Mapping[str, Sequence[str]]) -> None:
        """On the event loop, where they are counted: numbers that belong together stay so.
        ``names`` of the digests, from now on."""
        self._names = names
        totals = self._source.snapshot.drafts
        totals.reseat()
        self._read = [
            *drafts.families(totals, self._source.base_name, names),
            *self._minute(),
            self._flagged(),
        ]

    def describe(self) -> Iterable[Metric]:
        """Nothing: no collection at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield from self._server()
        yield from self._protocol()
        yield from self._totals()
        yield from self._pool()
        yield from self._adapters()
        yield from self._read

    def _server(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("loramux_build_info", "The release; always 1", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield GaugeMetricFamily(
            "loramux_ready", "Whether requests should come here", value=not self._source.not_ready()
        )

    def _vllm(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        about: str,
        value: float,
    ) -> Metric:
        metric = family(f"vllm:{name}", about, labels=["model_name", "engine"])
        metric.add_metric([self._source.base_name, "0"], value)
        return metric

    def _protocol(self) -> Iterator[Metric]:
        """What the inference gateway's model-server protocol asks for."""
        snapshot, info = self._source.snapshot, self._source.info
        stats, pool = snapshot.stats, snapshot.stats.pool
        yield self._vllm(
            GaugeMetricFamily, "num_requests_running", "In the batch", stats.num_running
        )
        yield self._vllm(GaugeMetricFamily, "num_requests_waiting", "Queued", stats.num_waiting)
        held = pool.kv + pool.adapter_leased + pool.loading
        yield self._vllm(
            GaugeMetricFamily,
            "kv_cache_usage_perc",
            "Share of pool frames that cannot be reclaimed now (0-1)",
            held / pool.total if pool.total else 0.0,
        )
        if info is None:
            return
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The pool's shape; always 1",
            labels=["engine", "block_size", "num_gpu_blocks", "cache_dtype"],
        )
        config.add_metric(["0", str(info.page_tokens), str(info.num_frames), info.dtype], 1)
        yield config
        running = self._named(snapshot.resident)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters ready in the pool, and those that requests wait for; value: Unix seconds",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        waiting = self._named(frozenset(snapshot.waiting_adapters))
        most = max(info.max_num_seqs, len(running))
        lora.add_metric([str(most), ",".join(running), ",".join(waiting)], time.time())
        yield lora

    def _minute(self) -> Iterator[Metric]:
        """Newest values that a glance now and then would miss."""
        waits = self._source.snapshot.stats.num_waiting  # none, when an engine has just begun
        since = self._waiting_since if waits else None
        yield GaugeMetricFamily(
            "loramux_oldest_waiting_seconds",
            "How long the request waits that waits longest for its first step",
            value=0.0 if since is None else max(0.0, self._clock() - since),
        )
        lows = GaugeMetricFamily(
            "loramux_pool_frames_minimum",
            "Fewest frames in the last minute: free, and available (free or reclaimable)",
            labels=["kind"],
        )
        lows.add_metric(["free"], self._free.lowest())
        lows.add_metric(["available"], self._available.lowest())
        yield lows
        asked = self._asked.totals()
        yield GaugeHistogramMetricFamily(
            "loramux_adapter_requests_per_minute",
            "Adapters by the requests they had in the last minute (those with any)",
            buckets=_distribution(asked.values(), buckets.REQUESTS_A_MINUTE),
            gsum_value=asked.total(),
        )

    def _flagged(self) -> Metric:
        """A gauge: one that no name means any more is nobody's trouble."""
        flagged = self._source.snapshot.adapter_faults.flagged()
        worst = sorted((f for f in flagged if self._names.get(f[0])), key=lambda f: (-f[1], f[0]))
        family = GaugeMetricFamily(
            "loramux_flagged_adapter_errors",
            f"Requests that ended with numerical_error, of the {TOP_ADAPTERS} worst adapters that"
            " are flagged, and of the others",
            labels=["adapter"],
        )
        for digest, num in worst[:TOP_ADAPTERS]:
            label = adapter_label(digest, self._source.base_name, self._names)
            family.add_metric([label], num)
        family.add_metric([OTHERS], sum(num for _, num in worst[TOP_ADAPTERS:]))
        return family

    def _named(self, digests: Set[str]) -> list[str]:
        return sorted({name for digest in digests for name in self._names.get(digest, ())})

    def _totals(self) -> Iterator[Metric]:
        snapshot = self._source.snapshot
        for name, about, value in (
            ("prompt_tokens", "Prompt tokens processed", snapshot.prompt_tokens),
            ("generation_tokens", "Tokens made", snapshot.generation_tokens),
            ("num_preemptions", "Rows that had to give their frames back", snapshot.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up", snapshot.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found", snapshot.prefix_hits),
        ):
            yield self._vllm(CounterMetricFamily, name, about, value)
        success = CounterMetricFamily(
            "vllm:request_success",
            "Choices that ended well",
            labels=["model_name", "engine", "finished_reason"],
        )
        for reason, num in dict(snapshot.finished).items():
            success.add_metric([self._source.base_name, "0", reason], num)
        yield success
        for name, label, about, counts in (
            ("request_failed", "code", "Choices that failed", snapshot.failed),
            ("admission_rejected", "reason", "Requests refused at the door", snapshot.rejected),
            (
                "adapter_evictions",
                "reason",
                "Adapters that left the pool, by who needed the room",
                snapshot.adapter_evictions,
            ),
            (
                "entropy_adaptive_tokens",
                "model",
                "Tokens of entropy-adaptive requests by the model that made them",
                snapshot.model_tokens,
            ),
        ):
            family = CounterMetricFamily(f"loramux_{name}", about, labels=[label])
            for key, num in (dict.fromkeys(SEEDED.get(name, ()), 0) | counts).items():
                family.add_metric([key], num)
            yield family
        for name, about, total in (
            ("engine_steps", "Steps done", snapshot.steps),
            (
                "engine_restarts",
                "Engine processes that had to be replaced",
                snapshot.engine_restarts,
            ),
            ("requests_resumed", "Choices that a new engine went on with", snapshot.resumed),
            ("canary_misses", "Canaries whose token was another one", snapshot.canary_misses),
            (
                "memory_shortages",
                "Batches, guesses and loads that found no memory and were tried again",
                snapshot.shortages,
            ),
            ("nan_aborts", "Choices whose logits were not finite", snapshot.nan_aborts),
            ("prefix_evictions", "Cached pages that gave way", snapshot.evictions.get("prefix", 0)),
            ("adapter_load_bytes", "Bytes loaded into the pool", snapshot.adapter_load_bytes),
            (
                "adapter_arrival_wait_seconds",
                "Time a device stood still in a step for adapters still arriving",
                snapshot.arrival_wait_s,
            ),
        ):
            yield CounterMetricFamily(f"loramux_{name}", about, value=total)

    def _pool(self) -> Iterator[Metric]:
        snapshot = self._source.snapshot
        pool = snapshot.stats.pool
        frames = GaugeMetricFamily(
            "loramux_pool_frames", "Frames of the pool by owner", labels=["owner"]
        )
        for owner in ("free", "kv", "prefix", "adapter_leased", "adapter_warm", "loading"):
            frames.add_metric([owner], getattr(pool, owner))
        yield frames
        for name, about, value in (
            ("pool_frames_total", "Frames of the pool", pool.total),
            ("resident_adapters", "Adapters in the pool", len(snapshot.resident)),
            ("pinned_adapters", "Adapters that stay in the pool", len(snapshot.pinned)),
            ("loading_adapters", "Adapters on their way into the pool", snapshot.stats.num_loading),
            ("unfinished_requests", "Choices accepted and not ended", snapshot.unfinished),
        ):
            yield GaugeMetricFamily(f"loramux_{name}", about, value=value)

    def _adapters(self) -> Iterator[Metric]:
        """A gauge and no counter: an adapter enters and leaves the top, so the rest can shrink."""
        every = dict(self._source.snapshot.adapter_tokens)
        rest = list(every.pop("other", (0, 0)))
        busiest = sorted(every.items(), key=lambda item: (-sum(item[1]), item[0]))
        lines: dict[str, list[int]] = {}
        for digest, tokens in busiest[:TOP_ADAPTERS]:
            label = adapter_label(digest, self._source.base_name, self._names)
            _add(lines.setdefault(label, [0, 0]), tokens)
        for _, tokens in busiest[TOP_ADAPTERS:]:
            _add(rest, tokens)
        family = GaugeMetricFamily(
            "loramux_top_adapter_tokens",
            f"Tokens of the {TOP_ADAPTERS} busiest adapters since the start, and of the others",
            labels=["adapter", "kind"],
        )
        for name, tokens in [*lines.items(), (OTHERS, rest)]:
            family.add_metric([name, "prompt"], tokens[0])
            family.add_metric([name, "generation"], tokens[1])
        yield family


def _add(total: list[int], tokens: Sequence[int]) -> None:
    total[0] += tokens[0]
    total[1] += tokens[1]


def _distribution(values: Iterable[int], bounds: Sequence[int]) -> list[tuple[str, float]]:
    """How many of ``values`` are at most each of ``bounds``, as Prometheus writes that."""
    counts = [0] * (len(bounds) + 1)
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    return list(zip([*map(floatToGoString, bounds), "+Inf"], accumulate(counts), strict=True))
