"""One line a request, with what an operator needs and nothing that a client wrote."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import LONG, eventually, row
from tests.http.granting import client, grant

from loramux.errors import EngineFailed

FIELDS = {
    "time", "request_id", "method", "route", "status", "error", "tenant", "adapter",
    "prompt_tokens", "output_tokens", "duration_s", "ttft_s",
}  # fmt: skip


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The lines so far; asked with a number, once there are so many."""
    caplog.set_level(logging.DEBUG, "loramux.access")

    def found(num: int) -> list[dict[str, Any]]:
        def all_lines() -> list[dict[str, Any]]:
            records = [record for record in caplog.records if record.name == "loramux.access"]
            return [json.loads(record.getMessage()) for record in records]

        assert eventually(lambda: len(all_lines()) >= num)
        assert len(all_lines()) == num and all(line.keys() == FIELDS for line in all_lines())
        return all_lines()

    return found


def test_a_completion(shared: Running, lines: Any) -> None:
    answer = shared.complete("the dog", model="shout", max_tokens=4, n=2)
    [line] = lines(1)
    usage = answer.json()["usage"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["adapter"] == answer.headers["x-loramux-model"] == "shout@3"
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["output_tokens"] == usage["completion_tokens"] == 8
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert line["error"] is None and line["tenant"] is None
    assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_a_stream_has_its_line_at_its_end(shared: Running, lines: Any) -> None:
    shared.chat(max_tokens=5, stream=True)
    [line] = lines(1)
    assert (line["route"], line["adapter"]) == ("/v1/chat/completions", "base")
    assert line["output_tokens"] == 5 and line["error"] is None


def test_failures_have_their_code(shared: Running, lines: Any) -> None:
    shared.complete(model="nobody")
    shared.complete(temperature=9)
    shared.http.get("/v1/adapters?wait=x")
    shared.http.get("/v1/capacity?tokens=x")
    shared.http.get("/nothing")
    shared.http.put("/v1/completions")
    shared.http.get("/v1/models", headers={"origin": "http://evil.example"})
    shared.http.post("/v1/completions", content=b"x" * (9 << 20))
    found = [(line["route"], line["status"], line["error"]) for line in lines(8)]
    assert found == [
        ("/v1/completions", 404, "model_not_found"),
        ("/v1/completions", 400, "invalid_request"),
        ("/v1/adapters", 200, None),
        ("/v1/capacity", 400, "invalid_request"),
        (None, 404, "route_not_found"),
        ("/v1/completions", 405, "method_not_allowed"),
        ("/v1/models", 403, "origin_not_allowed"),
        ("/v1/completions", 413, "payload_too_large"),
    ]
    assert all(line["prompt_tokens"] is line["ttft_s"] is None for line in lines(8))


def test_what_fails_after_the_200(start: Start, lines: Any) -> None:
    server = start()

    async def fail(_: Any) -> Any:
        yield [5]
        yield EngineFailed("a failure")

    server.front.script = fail
    server.complete(stream=True, max_tokens=9)
    [line] = lines(1)
    assert line["status"] == 200 and line["error"] == "engine_failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(start: Start, lines: Any, stream: bool) -> None:
    server = start()

    async def wait(_: Any) -> Any:
        yield [5]
        while not server.front.aborted:
            await asyncio.sleep(0.005)
        yield [5]

    server.front.script = wait
    body = {"model": "base", "prompt": "a", "max_tokens": 9, "stream": stream}
    raw = wire.post(server, "/v1/completions", **body)
    assert eventually(lambda: server.front.specs)
    raw.close()
    [line] = lines(1)
    assert line["error"] == "client_gone"


def test_a_client_that_leaves_when_all_is_said_and_not_all_is_read(
    start: Start, lines: Any
) -> None:
    server = start()
    server.front.info = LONG
    body = {"model": "base", "prompt": "a", "max_tokens": 20_000, "logprobs": 5, "stream": True}
    raw = wire.post(server, "/v1/completions", small_buffer=True, **body)
    assert eventually(lambda: server.front.snapshot.finished.get("length") == 1, within_s=30)
    raw.close()
    [line] = lines(1)
    assert line["error"] == "client_gone" and line["output_tokens"] == 20_000
    assert server.metric("loramux_disconnect_aborts_total") == 1


def test_a_client_that_leaves_in_its_body(shared: Running, lines: Any) -> None:
    raw = wire.connect(shared)
    raw.sendall(wire.request("/v1/completions", b"{}", "content-type: application/json")[:-1])
    raw.close()
    [line] = lines(1)
    assert line["error"] == "client_gone"


def test_tenants_are_hashed_and_names_are_short(
    start: Start, tmp_path: Path, lines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = grant(tmp_path / "keys.json", "acme")
    server = start(data_dir=tmp_path)
    server.front.adapters.put(row("a" * 96))
    client(server, key).complete(model="a" * 96, max_tokens=1)
    server.http.get("/v1/models")
    good, bad = lines(2)
    assert good["tenant"] == hashlib.sha256(b"acme").hexdigest()[:12]
    assert good["adapter"] == "a" * 64
    assert (bad["status"], bad["error"], bad["tenant"]) == (401, "invalid_api_key", None)
    assert "acme" not in caplog.text


def test_probes_are_quiet(start: Start, caplog: pytest.LogCaptureFixture, lines: Any) -> None:
    server = start()
    for path in ("/health", "/health/live", "/health/ready", "/metrics", "/version"):
        server.http.get(path)
    lines(5)
    loud = [r for r in caplog.records if r.name == "loramux.access" and r.levelno >= logging.INFO]
    assert [json.loads(record.getMessage())["route"] for record in loud] == ["/version"]
    server.front.reasons = ["engine_starting"]
    server.http.get("/health")
    lines(6)
    assert caplog.records[-1].levelno == logging.DEBUG
    server.http.get("/health", headers={"origin": "http://evil.example"})
    lines(7)
    assert caplog.records[-1].levelno == logging.INFO


def test_it_can_be_off(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    start(access_log="off").complete(max_tokens=1)
    assert not [record for record in caplog.records if record.name == "loramux.access"]
