"""OpenTelemetry spans of finished requests, from the times that are measured anyway.

    POST /v1/completions        the request (server), a child of the client's traceparent
    ├─ adapter load             when one of its adapters came into the pool meanwhile
    ├─ queue, prefill, decode   of each choice

Nothing is measured for them: when a request is over, its Exchange is told in spans. Attributes are
numbers and names of ours, under the semantic conventions' names (http, gen_ai) where they have one;
never text. OTEL_* variables say where spans go, which are kept, and what the service is called.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loramux import __version__
from loramux.config import otlp_protocol
from loramux.errors import ConfigError
from loramux.front.generation import Done, GenerationSpec
from loramux.http.access_log import known_method, pseudonym
from loramux.http.exchanges import Exchange

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

MAX_CHOICES = 16
"""Of a request with more choices the first ones have spans; ``gen_ai.request.choice.count`` tells
how many there were."""

LAST_WORDS_S = 2.0
"""At the end so long is waited for a collector that does not answer."""

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}

Loads = Mapping[str, tuple[float, float]]
"""Digest -> ``time.monotonic()`` of the begin and end of its last way into the pool."""


def otlp_exporter() -> SpanExporter:
    """Sends spans as OTLP over HTTP. Raises ConfigError when that cannot be."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "--otel needs the extra: pip install 'loramux[otel]'", param="otel"
        ) from None
    if otlp_protocol() != "http/protobuf":
        raise ConfigError(
            "--otel speaks OTLP over HTTP: set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf",
            param="otel",
        )
    return OTLPSpanExporter()


class Traces:
    """``write`` tells one request. ``loads`` is read, never changed."""

    def __init__(self, exporter: SpanExporter, loads: Loads) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._exporter = exporter
        self._provider = _provider()
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loramux", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._loads = loads

    def close(self) -> None:
        """Sends what is left; waits for it, for a while."""
        enough = threading.Timer(LAST_WORDS_S, self._exporter.shutdown)
        enough.start()
        self._provider.shutdown()
        enough.cancel()

    def write(self, exchange: Exchange) -> None:
        """The spans of one request. Probes have none."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        if exchange.is_probe:
            return
        method = known_method(exchange.method)
        span = self._tracer.start_span(
            f"{method} {exchange.route}".rstrip(),
            context=self._propagator.extract({"traceparent": exchange.traceparent}),
            kind=SpanKind.SERVER,
            attributes=_attributes(exchange, method),
            start_time=_ns(exchange.began_at),
        )
        if exchange.status >= 500 or (exchange.error is not None and exchange.status < 400):
            span.set_status(Status(StatusCode.ERROR))
        if exchange.choices is not None and span.is_recording():
            inside = set_span_in_context(span)
            offset = exchange.began_at - exchange.began
            generations = exchange.choices.generations
            for index, generation in enumerate(generations[:MAX_CHOICES]):
                if generation.done is not None:
                    self._choice(inside, offset, index, generation.done, generation.spec)
            if generations:
                self._arrivals(inside, offset, exchange, generations[0].spec)
        span.end(_ns(exchange.began_at + exchange.seconds))

    def _choice(
        self, inside: Context, offset: float, index: int, done: Done, spec: GenerationSpec
    ) -> None:
        first = done.first_token_at
        if first is None:
            return
        prefill = first - done.prefill_s
        told: dict[str, Any] = {"loramux.choice": index}
        self._span("queue", inside, offset + prefill - done.queue_s, offset + prefill, told)
        tokens = {"gen_ai.usage.input_tokens": len(spec.prompt_ids)}
        cached = {"loramux.cached_tokens": done.cached_tokens}
        self._span("prefill", inside, offset + prefill, offset + first, told | tokens | cached)
        tokens = {"gen_ai.usage.output_tokens": done.num_output_tokens}
        self._span("decode", inside, offset + first, offset + done.finished_at, told | tokens)

    def _arrivals(
        self, inside: Context, offset: float, exchange: Exchange, spec: GenerationSpec
    ) -> None:
        for digest in dict.fromkeys(spec.digests):
            began, ended = self._loads.get(digest, (0.0, 0.0))
            if began < exchange.began + exchange.seconds and ended > exchange.began:
                told = {"loramux.adapter.digest": digest}
                self._span("adapter load", inside, offset + began, offset + ended, told)

    def _span(
        self, name: str, inside: Context, began: float, ended: float, told: dict[str, Any]
    ) -> None:
        span = self._tracer.start_span(name, context=inside, attributes=told, start_time=_ns(began))
        span.end(_ns(ended))


def _provider() -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    ours = Resource({"service.name": "loramux", "service.version": __version__})
    return TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _attributes(exchange: Exchange, method: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "http.request.method": method,
        "http.response.status_code": exchange.status,
        "loramux.request_id": exchange.request_id,
    }
    if exchange.route:
        told["http.route"] = exchange.route
    if exchange.error is not None:
        told["error.type"] = exchange.error
    if exchange.tenant:
        told["loramux.tenant"] = pseudonym(exchange.tenant)
    choices = exchange.choices
    if choices is None or not choices.generations:
        return told
    sampling = choices.generations[0].spec.sampling
    told |= {
        "gen_ai.operation.name": _OPERATIONS.get(exchange.route, ""),
        "gen_ai.provider.name": "loramux",
        "gen_ai.response.model": exchange.model,
        "gen_ai.response.id": choices.id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": len(choices.generations),
        "gen_ai.usage.input_tokens": exchange.prompt_tokens,
        "gen_ai.usage.output_tokens": exchange.output_tokens,
    }
    ends = [generation.done for generation in choices.generations]
    reasons = [done.finish_reason for done in ends if done is not None]
    if reasons:
        told["gen_ai.response.finish_reasons"] = reasons
    if exchange.first_token_s is not None:
        told["loramux.time_to_first_token_s"] = exchange.first_token_s
    return told
