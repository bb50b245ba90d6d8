"""HTTP over the real front with scripted processes: the two halves fit.

``cache_salt`` is the fake engine's script, see tests/front/fake_engine.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.front.house import ENGINE, INGEST, PROMPT, SERVER, configure
from tests.http import wire
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal

from loramux.front.front import Front


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path_factory.mktemp("real"), port=0, keep_alive_s=0.02)
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        yield server
        stop()


def upload(server: Running, name: str, config: object, query: str = "?wait=30"):  # type: ignore[no-untyped-def]
    files = {"config": json.dumps(config).encode(), "weights": name.encode() * 9}
    return server.http.post("/v1/adapters" + query, data={"name": name}, files=files)


def test_completion_and_stream(real: Running) -> None:
    whole = real.complete(PROMPT, max_tokens=8, return_token_ids=True).json()
    assert whole["choices"][0]["token_ids"] == [PROMPT[i % 5] for i in range(8)]
    raw = wire.post(real, "/v1/completions", model="base", prompt=PROMPT, max_tokens=8, stream=True)
    found = wire.events(wire.read_until(raw, b"0\r\n\r\n"))
    texts = [event["choices"][0]["text"] for event in found[:-1]]
    assert found[-1] is None and "".join(texts) == whole["choices"][0]["text"]


def test_an_adapters_whole_life(real: Running) -> None:
    answer = upload(real, "new", {"r": 8})
    assert answer.status_code == 201, answer.text
    assert upload(real, "new", {"r": 8}).status_code == 200
    digest = answer.json()["digest"]
    assert real.complete(model="new").headers["x-loramux-adapter"] == digest
    assert refusal(upload(real, "new", {"r": 9}), 409)["code"] == "generation_conflict"
    answer = upload(real, "new", {"r": 9}, "?wait=30&expected_generation=1")
    assert answer.status_code == 201 and answer.json()["generation"] == 2
    assert real.http.put("/v1/adapters/new/pin").json()["pinned"]
    assert real.http.delete("/v1/adapters/new/pin").json()["pinned"] is False
    assert [card["id"] for card in real.http.get("/v1/models").json()["data"]] == ["base", "new"]
    assert real.http.delete("/v1/adapters/new").status_code == 202
    assert refusal(real.complete(model="new"), 404)["code"] == "model_not_found"
    error = refusal(upload(real, "bad", {"bad": ["one", "two"]}), 422)
    assert error["problems"] == ["one", "two"]
    assert real.http.get("/v1/adapters/bad").json()["status"] == "failed"
    assert refusal(real.complete(model="bad"), 409)["code"] == "adapter_failed"
    assert upload(real, "dry", {}, "?validate_only=1").json()["generation"] == 0


def test_bad_prompts_are_refused_before_the_front(real: Running) -> None:
    assert refusal(real.complete([400]))["param"] == "prompt"
    limit = real.http.get("/v1/models").json()["data"][0]["max_model_len"]
    assert refusal(real.complete([5] * limit))["code"] == "context_length_exceeded"


def test_leaving_reaches_the_engine(real: Running) -> None:
    raw = wire.post(
        real,
        "/v1/completions",
        model="base",
        prompt=PROMPT,
        max_tokens=50,
        stream=True,
        cache_salt="delay=0.05",
    )
    wire.read_until(raw, b"data: ")
    raw.close()

    def aborted() -> bool:
        return len(real.http.get("/admin/state").json()["engine"]["aborted"]) == 1

    assert eventually(aborted)


def test_a_stream_whose_engine_dies_pauses(real: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30}
    whole = real.complete(**body).json()["choices"][0]["text"]
    body |= {"model": "base", "cache_salt": "delay=0.01 die=5@1 kill=9@2"}
    raw = wire.post(real, "/v1/completions", stream=True, **body)
    answer = wire.read_until(raw, b"0\r\n\r\n")
    found = wire.events(answer)
    assert found.pop() is None and b": keep-alive" in answer
    assert "".join(event["choices"][0]["text"] for event in found) == whole
    assert eventually(lambda: real.http.get("/health").status_code == 200, within_s=30)
    assert real.metric("loramux_engine_restarts_total") == 2
    assert real.metric("loramux_requests_resumed_total") == 2


def test_what_ends_every_engine_is_an_error(real: Running) -> None:
    answer = real.complete(PROMPT, max_tokens=30, cache_salt="die=5")
    assert refusal(answer, 500)["code"] == "poison_request"
    assert answer.headers["x-should-retry"] == "false"
    assert eventually(lambda: real.http.get("/health").status_code == 200, within_s=30)
    assert real.complete(PROMPT).status_code == 200


def test_a_deadline_that_has_passed(real: Running) -> None:
    answer = real.complete(PROMPT, deadline_s=1e-9)
    assert refusal(answer, 504)["code"] == "deadline_exceeded"
    assert refusal(real.complete(PROMPT, deadline_s=0))["param"] == "deadline_s"
    assert real.complete(PROMPT, deadline_s=100).status_code == 200
