"""Metrics as a server tells them: who may read them, and which errors clients were told of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually, tokens

from loramux.errors import DeadlineExceeded
from loramux.front.generation import GenerationSpec
from loramux.front.keys import KeysFile, new_key


def errors(server: Running) -> dict[tuple[str, str], int]:
    """(type, stage) -> how many, of those that there were."""
    found = {}
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("loramux_errors_total{"):
            labels, number = line.split(" ")
            _, stage, _, kind, _ = labels.split('"')
            if number != "0.0":
                found[kind, stage] = int(float(number))
    return found


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str]:
    """A keys file and the text of its only key, which may infer."""
    key, text = new_key("acme", ("infer",))
    (path := tmp_path / "keys.json").write_bytes(msgspec.json.encode(KeysFile(keys=[key])))
    return path, text


def test_with_keys_the_metrics_are_the_administrators(start: Start, keys: tuple[Path, str]) -> None:
    server = start(api_keys=keys[0])
    assert server.http.get("/metrics").status_code == 401
    bearer = {"authorization": f"Bearer {keys[1]}"}
    assert server.http.get("/metrics", headers=bearer).status_code == 403


def test_public_metrics_need_no_key_and_open_nothing_else(
    start: Start, keys: tuple[Path, str]
) -> None:
    server = start(api_keys=keys[0], public_metrics=True)
    answer = server.http.get("/metrics")
    assert answer.status_code == 200 and "vllm:num_requests_running" in answer.text
    for path in ("/admin/state", "/v1/models", "/v1/adapters"):
        assert server.http.get(path).status_code == 401
    assert server.http.post("/metrics").status_code in (401, 405)


def test_errors_before_and_in_an_answer_are_counted_apart(start: Start) -> None:
    async def late(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        yield tokens("hello")
        yield DeadlineExceeded("too late")

    server = start()
    assert errors(server) == {}
    assert server.complete(temperature=9).status_code == 400
    assert server.http.get("/nowhere").status_code == 404
    assert server.complete(model="nobody").status_code == 404
    assert server.complete(max_tokens=3).status_code == 200
    expected = {("invalid_request_error", "answer"): 1, ("not_found_error", "answer"): 2}
    assert eventually(lambda: errors(server) == expected)
    server.front.script = late
    assert server.complete(max_tokens=30).status_code == 504
    expected["timeout_error", "answer"] = 1
    assert eventually(lambda: errors(server) == expected)
    answer = server.complete(max_tokens=30, stream=True)
    assert answer.status_code == 200 and "timeout_error" in answer.text
    expected["timeout_error", "stream"] = 1
    assert eventually(lambda: errors(server) == expected)
