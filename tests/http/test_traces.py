"""Spans of finished requests: their tree, their times, and what they may not say."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.http.conftest import Running, Start, launch
from tests.http.granting import bearer, grant

from loramux.config import ServerConfig
from loramux.errors import ConfigError, EngineFailed
from loramux.http import app, traces
from loramux.metrics.stats import AdapterLoad, StepStats

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Tell = Callable[..., list[ReadableSpan]]


@pytest.fixture
def tell(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """``tell(ask, **settings)``: the spans of what ``ask(server)`` asks."""

    def tell(ask: Callable[[Running], Any], **settings: Any) -> list[ReadableSpan]:
        memory = InMemorySpanExporter()
        monkeypatch.setattr(app, "otlp_exporter", lambda: memory)
        values = {"otel": True, "data_dir": tmp_path, **settings}
        server, stop = launch(model_dir, **values)
        try:
            ask(server)
        finally:
            stop()
        return list(memory.get_finished_spans())

    return tell


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def of(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def test_a_request_is_a_tree(tell: Tell) -> None:
    answers = []
    before = time.time_ns()
    spans = tell(lambda server: answers.append(server.complete(model="shout", max_tokens=4)))
    [root] = of(spans, "POST /v1/completions")
    assert root.kind is SpanKind.SERVER and root.parent is None
    assert {span.name for span in spans} == {root.name, "queue", "prefill", "decode"}
    assert before < root.start_time <= root.end_time < time.time_ns()
    for span in spans:
        if span is not root:
            assert span.parent is not None and span.parent.span_id == root.context.span_id
            assert span.context.trace_id == root.context.trace_id
    [queue], [prefill], [decode] = (of(spans, name) for name in ("queue", "prefill", "decode"))
    assert queue.end_time == prefill.start_time and prefill.end_time == decode.start_time
    assert root.start_time <= decode.start_time <= decode.end_time <= root.end_time
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(0.01, abs=1e-5)
    assert (prefill.end_time - prefill.start_time) / 1e9 == pytest.approx(0.02, abs=1e-5)
    usage = answers[0].json()["usage"]
    found = attributes(root)
    assert (
        found.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.response.model": "shout@3",
            "gen_ai.response.id": answers[0].json()["id"],
            "gen_ai.response.finish_reasons": ("length",),
            "gen_ai.request.max_tokens": 4,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": 4,
            "loramux.request_id": answers[0].headers["x-request-id"],
        }.items()
    )
    assert attributes(decode)["gen_ai.usage.output_tokens"] == 4
    assert root.status.status_code is StatusCode.UNSET and "error.type" not in found
    assert root.resource.attributes["service.name"] == "loramux"


def test_traceparent(tell: Tell) -> None:
    def ask(server: Running) -> None:
        for parent in (PARENT, "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01"):
            server.http.get("/v1/models", headers={"traceparent": parent})

    child, *alone = tell(ask)
    assert child.parent is not None
    assert f"{child.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{child.parent.span_id:016x}" == "b7ad6b7169203331"
    assert len(alone) == 2 and all(span.parent is None for span in alone)


def test_a_parent_that_is_not_sampled(tell: Tell) -> None:
    parent = {"traceparent": PARENT[:-1] + "0"}
    assert tell(lambda server: server.http.get("/v1/models", headers=parent)) == []


def test_an_adapter_that_came_meanwhile(tell: Tell) -> None:
    def ask(server: Running) -> None:
        digest = server.front.adapters.show("shout").digest
        other = server.front.adapters.show("whisper").digest
        observe = server.front.observations

        async def load(_: Any) -> Any:
            loads = [AdapterLoad(digest, 0.001, 10), AdapterLoad(other, 0.001, 10)]
            observe.step(StepStats(loads=loads))
            yield [5]

        server.complete(model="shout", max_tokens=1)
        server.front.script = load
        server.complete(model="shout", max_tokens=1)
        server.complete(max_tokens=1)

    spans = tell(ask)
    [load] = of(spans, "adapter load")
    root = of(spans, "POST /v1/completions")[1]
    assert load.parent is not None and load.parent.span_id == root.context.span_id
    assert (load.end_time - load.start_time) / 1e9 == pytest.approx(0.001, abs=1e-5)
    assert len(attributes(load)["loramux.adapter.digest"]) == 64


def test_every_choice_has_its_spans_up_to_a_bound(tell: Tell) -> None:
    prompts = ["a"] * 9
    spans = tell(lambda server: server.complete(prompts, n=2, max_tokens=2))
    for name in ("queue", "prefill", "decode"):
        choices = [attributes(span)["loramux.choice"] for span in of(spans, name)]
        assert choices == list(range(traces.MAX_CHOICES))
    [root] = of(spans, "POST /v1/completions")
    assert attributes(root)["gen_ai.request.choice.count"] == 18


def test_failures(tell: Tell) -> None:
    def ask(server: Running) -> None:
        async def fail(_: Any) -> Any:
            yield [5]
            yield EngineFailed("a failure")

        server.complete(temperature=9)
        server.front.script = fail
        server.complete(max_tokens=9)
        server.complete(max_tokens=9, stream=True)

    refused, failed, streamed = tell(ask)
    assert attributes(refused)["error.type"] == "invalid_request"
    assert refused.status.status_code is StatusCode.UNSET, "the client's error is not the server's"
    for span in (failed, streamed):
        assert attributes(span)["error.type"] == "engine_failed"
        assert span.status.status_code is StatusCode.ERROR


def test_nothing_that_a_client_wrote(tell: Tell, tmp_path: Path) -> None:
    secret = "hunter2hunter2"
    key = grant(tmp_path / "keys.json", "acme")

    def ask(server: Running) -> None:
        headers = {**bearer(key), "user-agent": secret, "baggage": f"a={secret}"}
        body = {
            "model": "base",
            "prompt": secret,
            "user": secret,
            "stop": [secret],
            "max_tokens": 2,
        }
        for path in (f"/v1/completions?a={secret}", f"/{secret}"):
            server.http.post(path, json=body, headers=headers)
        server.http.get(f"/v1/adapters/{secret}", headers=headers)
        server.http.get("/health")

    spans = tell(ask)
    assert len(spans) == 3 + 3
    text = "".join(f"{span.to_json()}" for span in spans)
    assert not [planted for planted in (secret, key, "acme") if planted in text]
    assert {attributes(span).get("http.route") for span in spans} >= {"/v1/adapters/{name}"}
    assert len(of(spans, "POST")) == 1, "no route, no path"


def test_off_is_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(app, "Traces", never)
    monkeypatch.setattr(app, "otlp_exporter", never)
    assert start().complete(max_tokens=1).status_code == 200


def test_off_imports_nothing() -> None:
    """The SDK; its API alone is there because FastAPI has it."""
    code = "import sys, loramux.http.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"loramux\[otel\]"):
        traces.otlp_exporter()


def test_a_protocol_that_it_does_not_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="http/protobuf"):
        traces.otlp_exporter()


def test_the_standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert ServerConfig().otel is False
    assert traces.otlp_exporter()._endpoint == "http://127.0.0.1:9/v1/traces"  # type: ignore[attr-defined]
    memory = InMemorySpanExporter()
    told = traces.Traces(memory, {})
    told._tracer.start_span("x").end()
    told.close()
    [span] = memory.get_finished_spans()
    assert span.resource.attributes["service.name"] == "mine"


def test_a_collector_that_does_not_answer_holds_up_the_end_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent(InMemorySpanExporter):
        given_up = threading.Event()

        def export(self, spans: object) -> SpanExportResult:
            assert self.given_up.wait(25), "nobody told it to give up"
            return SpanExportResult.FAILURE

        def shutdown(self) -> None:
            self.given_up.set()

    monkeypatch.setattr(traces, "LAST_WORDS_S", 0.05)
    told = traces.Traces(Silent(), {})
    told._tracer.start_span("x").end()
    told.close()
    assert Silent.given_up.is_set()
