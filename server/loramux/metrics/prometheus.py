"""What a scraper sees. Names and buckets are vLLM's where the meaning is vLLM's, so its dashboards
and the Kubernetes inference gateway work unchanged; everything else is ``loramux_*``.

No label ever holds what a client wrote, and no histogram is labelled by adapter: a thousand
adapters times five histograms would be ten megabytes a scrape. Per adapter there are one gauge and
what became of guesses (``metrics.drafts``), for the twenty busiest.

Totals and gauges are read from the front's snapshot when someone scrapes; histograms are fed by
single events (``Exporter`` is the front's observer).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux.errors import LoramuxError
from loramux.metrics import drafts
from loramux.metrics.labels import OTHERS, adapter_label
from loramux.metrics.stats import StepStats
from loramux.request import SamplingParams
from loramux.wire import Ready

CACHE_S = 0.25
"""The inference gateway scrapes every 50 ms; the bytes are made at most this often."""
TOP_ADAPTERS = 20

# fmt: off
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
         40, 80, 160, 640, 2560)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
        80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
            7680)
# fmt: on
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_N = (1, 2, 5, 10, 20)


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
    steps: int
    unfinished: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    adapter_loads: int
    adapter_load_bytes: int
    arrival_wait_s: float
    evictions: dict[str, int]
    finished: dict[str, int]
    failed: dict[str, int]
    rejected: dict[str, int]
    adapter_tokens: dict[str, list[int]]
    model_tokens: dict[str, int]

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


class Spec(Protocol):
    """The part of a choice that is counted."""

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""

    @property
    def sampling(self) -> SamplingParams:
        """What was asked."""

    @property
    def arrived_at(self) -> float:
        """``time.monotonic()`` of the request's arrival."""


class Done(Protocol):
    """The part of a good end that is counted; seconds, and ``*_at`` monotonic readings."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens made."""

    @property
    def queue_s(self) -> float:
        """Waiting for the first step."""

    @property
    def prefill_s(self) -> float:
        """From the first step to the first token."""

    @property
    def first_token_at(self) -> float | None:
        """None when no token came."""

    @property
    def finished_at(self) -> float:
        """The end."""


class Exporter:
    """Observes the front and renders everything as Prometheus text.

    ``names`` maps digests to the adapter names that mean them now. Methods of the observer run on
    the event loop and cost microseconds.
    """

    def __init__(self, source: Source, names: Callable[[], Mapping[str, Sequence[str]]]) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._names = names
        self._collector = _SnapshotCollector(source)
        self._rendered = b""
        self._rendered_at = -CACHE_S
        self._rendering = asyncio.Lock()
        labels = {"model_name": source.base_name, "engine": "0"}

        def vllm(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(
                f"vllm:{name}", about, labels, buckets=buckets, registry=self.registry
            )
            return family.labels(**labels)

        def own(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"loramux_{name}", about, buckets=buckets, registry=self.registry)

        tokens = _one_two_five(1 << 20)
        self._ttft = vllm("time_to_first_token_seconds", "From arrival to first token", _TTFT)
        self._itl = vllm("inter_token_latency_seconds", "Between tokens of a choice", _ITL)
        self._e2e = vllm("e2e_request_latency_seconds", "From arrival to the end", _REQUEST)
        self._queue = vllm("request_queue_time_seconds", "Waiting for a place", _REQUEST)
        self._prefill = vllm("request_prefill_time_seconds", "Reading the prompt", _REQUEST)
        self._decode = vllm("request_decode_time_seconds", "First token to last", _REQUEST)
        self._inference = vllm("request_inference_time_seconds", "Prefill and decode", _REQUEST)
        self._prompt = vllm("request_prompt_tokens", "Prompt tokens of a choice", tokens)
        self._output = vllm("request_generation_tokens", "Output tokens of a choice", tokens)
        self._max_tokens = vllm("request_params_max_tokens", "max_tokens asked for", tokens)
        self._n = vllm("request_params_n", "Choices asked for", _N)
        self._iteration = vllm("iteration_tokens_total", "Tokens in a step", _ITERATION)
        self._batch_adapters = own("batch_adapters", "Adapter lists in a step", _ADAPTERS)
        self._load = own("adapter_load_seconds", "Loading an adapter into the pool", _LOAD)
        self._step = Histogram(
            "loramux_engine_step_seconds",
            "Time of a step by phase",
            ["phase"],
            buckets=_STEP,
            registry=self.registry,
        )
        self._count_events()
        self.registry.register(self._collector)
        ProcessCollector(registry=self.registry)

    def _count_events(self) -> None:
        def count(name: str, about: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"loramux_{name}", about, labels, registry=self.registry)

        self._uploads = count("uploads", "Adapter uploads by result", ["result"])
        self._restarts = count(
            "engine_restarts_by_reason", "Why the engine was replaced", ["reason"]
        )
        self._gone = count("disconnect_aborts", "Answers whose client left before their end")
        self._unknown = count("unknown_fields", "Request fields nobody knows, ignored")

    # What HTTP tells.

    def asked(self, num_choices: int) -> None:
        """A well-formed request came, with this ``n``."""
        self._n.observe(num_choices)

    def disconnected(self) -> None:
        """A client left before the end of its answer."""
        self._gone.inc()

    def ignored(self, num: int) -> None:
        """A request had this many fields nobody knows."""
        self._unknown.inc(num)

    # What the front tells (front.observations.Observer).

    def rejected(self, code: str) -> None:
        """Counted by the snapshot."""

    def submitted(self, spec: Spec) -> None:
        """A choice was accepted."""
        self._max_tokens.observe(spec.sampling.max_tokens)

    def first_token(self, spec: Spec, seconds: float) -> None:
        """``seconds`` after the request arrived."""
        self._ttft.observe(seconds)

    def more_tokens(self, spec: Spec, num_tokens: int, seconds: float) -> None:
        """Tokens that came together share the time since the ones before."""
        for _ in range(num_tokens):
            self._itl.observe(seconds / num_tokens)

    def finished(self, spec: Spec, done: Done) -> None:
        """The good terminal event."""
        self._e2e.observe(done.finished_at - spec.arrived_at)
        self._queue.observe(done.queue_s)
        self._prompt.observe(len(spec.prompt_ids))
        self._output.observe(done.num_output_tokens)
        if done.first_token_at is not None:
            decode_s = done.finished_at - done.first_token_at
            self._prefill.observe(done.prefill_s)
            self._decode.observe(decode_s)
            self._inference.observe(done.prefill_s + decode_s)

    def failed(self, spec: Spec, error: LoramuxError) -> None:
        """Counted by the snapshot."""

    def step(self, stats: StepStats) -> None:
        """The engine finished a step."""
        if stats.batch_rows:
            self._iteration.observe(stats.batch_tokens)
            self._batch_adapters.observe(stats.batch_adapters)
        for phase, seconds in stats.phase_s.items():
            self._step.labels(phase).observe(seconds)
        for load in stats.loads:
            self._load.observe(load.seconds)

    def uploaded(self, result: str) -> None:
        """``ready``, or the code of the refusal."""
        self._uploads.labels(result).inc()

    def engine_restarted(self, reason: str) -> None:
        """``exit``, ``heartbeat`` or ``step_timeout``."""
        self._restarts.labels(reason).inc()

    async def render(self) -> bytes:
        """The exposition text; at most CACHE_S old, made on a thread."""
        async with self._rendering:
            if time.monotonic() - self._rendered_at >= CACHE_S:
                self._collector.names = self._names()
                self._collector.read_drafts()
                self._rendered = await asyncio.to_thread(
                    prometheus_client.generate_latest, self.registry
                )
                self._rendered_at = time.monotonic()
            return self._rendered


class _SnapshotCollector(Collector):
    """Turns the snapshot into metric families; runs on a thread, so it copies every dict first."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.names: Mapping[str, Sequence[str]] = {}
        self._drafts: list[Metric] = []

    def read_drafts(self) -> None:
        """On the event loop, where they are counted: numbers that belong together stay so."""
        totals = self._source.snapshot.drafts
        totals.reseat()
        self._drafts = list(drafts.families(totals, self._source.base_name, self.names))

    def describe(self) -> Iterable[Metric]:
        """Nothing: no collection at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield from self._protocol()
        yield from self._totals()
        yield from self._pool()
        yield from self._adapters()
        yield from self._drafts

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

    def _named(self, digests: Set[str]) -> list[str]:
        return sorted({name for digest in digests for name in self.names.get(digest, ())})

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
            ("adapter_evictions", "reason", "Adapters that left the pool", snapshot.evictions),
            (
                "entropy_adaptive_tokens",
                "model",
                "Tokens of entropy-adaptive requests by the model that made them",
                snapshot.model_tokens,
            ),
        ):
            family = CounterMetricFamily(f"loramux_{name}", about, labels=[label])
            for key, num in dict(counts).items():
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
            ("nan_aborts", "Choices whose logits were not finite", snapshot.nan_aborts),
            ("adapter_loads", "Adapters loaded into the pool", snapshot.adapter_loads),
            ("adapter_load_bytes", "Bytes of them", snapshot.adapter_load_bytes),
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
            label = adapter_label(digest, self._source.base_name, self.names)
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


def _one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... up to ``most``: vLLM's buckets for counts of tokens."""
    steps = (digit * 10**power for power in range(8) for digit in (1, 2, 5))
    return [step for step in steps if step <= most]
