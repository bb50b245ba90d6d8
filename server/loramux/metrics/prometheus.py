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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from loramux import errors
from loramux.errors import LoramuxError
from loramux.metrics import buckets
from loramux.metrics.collector import SnapshotCollector, Source
from loramux.metrics.stats import StepStats
from loramux.request import SamplingParams

CACHE_S = 0.25
"""The inference gateway scrapes every 50 ms; the bytes are made at most this often."""
ERROR_TYPES = sorted({kind.type for kind in vars(errors).values() if hasattr(kind, "type")})


class Spec(Protocol):
    """The part of a choice that is counted."""

    @property
    def digests(self) -> Iterator[str]:
        """The adapters it needs."""

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
        self._collector = SnapshotCollector(source)
        self._rendered = b""
        self._rendered_at = -CACHE_S
        self._rendering = asyncio.Lock()
        labels = {"model_name": source.base_name, "engine": "0"}

        def vllm(name: str, about: str, bounds: Sequence[float]) -> Histogram:
            family = Histogram(
                f"vllm:{name}", about, labels, buckets=bounds, registry=self.registry
            )
            return family.labels(**labels)

        def own(
            name: str, about: str, bounds: Sequence[float], labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(
                f"loramux_{name}", about, labels, buckets=bounds, registry=self.registry
            )

        tokens = buckets.TOKENS
        self._ttft = vllm(
            "time_to_first_token_seconds", "From arrival to first token", buckets.TTFT
        )
        self._itl = vllm("inter_token_latency_seconds", "Between tokens of a choice", buckets.ITL)
        self._e2e = vllm("e2e_request_latency_seconds", "From arrival to the end", buckets.REQUEST)
        self._queue = vllm("request_queue_time_seconds", "Waiting for a place", buckets.REQUEST)
        self._prefill = vllm("request_prefill_time_seconds", "Reading the prompt", buckets.REQUEST)
        self._decode = vllm("request_decode_time_seconds", "First token to last", buckets.REQUEST)
        self._inference = vllm(
            "request_inference_time_seconds", "Prefill and decode", buckets.REQUEST
        )
        self._prompt = vllm("request_prompt_tokens", "Prompt tokens of a choice", tokens)
        self._output = vllm("request_generation_tokens", "Output tokens of a choice", tokens)
        self._max_tokens = vllm("request_params_max_tokens", "max_tokens asked for", tokens)
        self._n = vllm("request_params_n", "Choices asked for", buckets.N)
        self._iteration = vllm("iteration_tokens_total", "Tokens in a step", buckets.ITERATION)
        self._batch_adapters = own("batch_adapters", "Adapter lists in a step", buckets.ADAPTERS)
        self._load = own(
            "adapter_load_seconds", "Asked until in the pool", buckets.LOAD, ["transition"]
        )
        self._step = own("engine_step_seconds", "Time of a step by phase", buckets.STEP, ["phase"])
        self._validation = own(
            "adapter_validation_seconds", "Examining an adapter", buckets.VALIDATION
        )
        self._count_events()
        self.registry.register(self._collector)
        ProcessCollector(registry=self.registry)

    def _count_events(self) -> None:
        def count(name: str, about: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"loramux_{name}", about, labels, registry=self.registry)

        self._uploads = count("uploads", "Adapter uploads by result", ["result"])
        for result in ("ready", "internal_error", "ingest_failed", "storage_full"):
            self._uploads.labels(result)
        self._loads = count("adapter_loads", "Adapters loaded into the pool", ["transition"])
        for source in ("disk", "host"):
            self._loads.labels(f"{source}_to_pool")
        self._invalid = count(
            "adapter_validation_failures", "Adapters found at fault, by what is wrong", ["code"]
        )
        self._errors = count(
            "errors",
            "Errors clients were told of, before an answer or in its stream",
            ["type", "stage"],
        )
        for kind in ERROR_TYPES:
            for stage in ("answer", "stream"):
                self._errors.labels(kind, stage)
        self._restarts = count(
            "engine_restarts_by_reason", "Why the engine was replaced", ["reason"]
        )
        for reason in ("exit", "heartbeat", "step_timeout", "canary"):
            self._restarts.labels(reason)
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

    def erred(self, error: LoramuxError, streaming: bool) -> None:
        """A client was told of ``error``; ``streaming``: after the beginning of its answer."""
        self._errors.labels(error.type, "stream" if streaming else "answer").inc()

    # What the front tells (front.observations.Observer).

    def rejected(self, code: str) -> None:
        """Counted by the snapshot."""

    def submitted(self, spec: Spec) -> None:
        """A choice was accepted."""
        self._collector.submitted(spec.digests)
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
        self._collector.stepped(stats)
        if stats.batch_rows:
            self._iteration.observe(stats.batch_tokens)
            self._batch_adapters.observe(stats.batch_adapters)
        for phase, seconds in stats.phase_s.items():
            self._step.labels(phase).observe(seconds)
        for load in stats.loads:
            transition = f"{load.source}_to_pool"
            self._loads.labels(transition).inc()
            self._load.labels(transition).observe(load.seconds)

    def uploaded(self, result: str) -> None:
        """``ready``, or the code of the refusal."""
        self._uploads.labels(result).inc()

    def validated(self, seconds: float, code: str) -> None:
        """An adapter was examined; ``code`` of what is wrong with it, or ""."""
        self._validation.observe(seconds)
        if code:
            self._invalid.labels(code).inc()

    def engine_restarted(self, reason: str) -> None:
        """``exit``, ``heartbeat``, ``step_timeout`` or ``canary``."""
        self._restarts.labels(reason).inc()

    async def render(self) -> bytes:
        """The exposition text; at most CACHE_S old, made on a thread."""
        async with self._rendering:
            if time.monotonic() - self._rendered_at >= CACHE_S:
                self._collector.read(self._names())
                self._rendered = await asyncio.to_thread(
                    prometheus_client.generate_latest, self.registry
                )
                self._rendered_at = time.monotonic()
            return self._rendered
