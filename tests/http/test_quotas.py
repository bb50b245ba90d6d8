"""What a tenant over its limits is told, and that others are not in its way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually, speak
from tests.http.granting import bearer, client, grant
from tests.http.test_adapters import CONF, END, NAME, part
from tests.http.test_bad_inputs import refusal

from loramux.front.generation import GenerationSpec
from loramux.front.keys import Limits, editing
from loramux.front.quotas import MAX_UPLOADS


@pytest.fixture
def house(start: Start, tmp_path: Path) -> Any:
    """``house(**limits)``: a server, seen by the tenant with these limits and by another."""

    def house(**limits: Any) -> tuple[Running, Running]:
        path = tmp_path / "keys.json"
        texts = [grant(path, tenant) for tenant in ("acme", "else")]
        with editing(path) as content:
            content.tenants["acme"] = Limits(**limits)
        server = start(api_keys=path)
        return client(server, texts[0]), client(server, texts[1])

    return house


async def never(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
    """Keeps a choice in flight."""
    import asyncio

    await asyncio.Event().wait()
    yield []


def test_requests_in_flight(house: Any) -> None:
    me, other = house(max_requests=3)
    front = me.front
    front.script = never
    raws = []
    for _ in range(2):
        raw = wire.connect(me)
        body = b'{"model": "base", "prompt": "a", "stream": true}'
        key = me.http.headers["authorization"]
        raw.sendall(
            wire.request(
                "/v1/completions", body, "content-type: application/json", f"authorization: {key}"
            )
        )
        raws.append(raw)
    assert eventually(lambda: len(front.specs) == 2)
    front.script = speak("x")
    answer = me.complete(n=2, max_tokens=2)
    error = refusal(answer, 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1 and answer.headers["x-should-retry"] == "true"
    assert me.complete(max_tokens=2).status_code == 200, "the third place"
    assert refusal(me.complete(n=4, max_tokens=2), 400)["param"] == "n"
    assert refusal(me.complete(["a"] * 4, max_tokens=2), 400)["param"] == "n"
    assert other.complete(n=8, max_tokens=2).status_code == 200
    for raw in raws:
        raw.close()
    assert eventually(lambda: me.complete(n=3, max_tokens=2).status_code == 200)


def test_tokens_a_minute(house: Any) -> None:
    me, other = house(tokens_per_minute=100)
    ids = [40] * 10
    assert me.complete(ids, max_tokens=60).status_code == 200
    answer = me.complete(ids, max_tokens=60)
    assert refusal(answer, 429)["code"] == "rate_limit_exceeded"
    assert 20 <= int(answer.headers["retry-after"]) <= 24, "40 tokens at 100 a minute"
    assert refusal(me.complete(ids, max_tokens=91), 400)["param"] == "max_tokens"
    assert refusal(me.complete([ids] * 2, n=2, max_tokens=20), 400)["param"] == "max_tokens"
    assert me.complete(ids, max_tokens=10).status_code == 200
    assert other.complete(ids, max_tokens=90).status_code == 200
    assert other.complete(ids, max_tokens=90).status_code == 200


def test_a_share_of_the_pool(house: Any) -> None:
    """Of 100 frames of 16 tokens: who could never fit in is refused, who says nothing fits in."""
    me, other = house(max_pool_share=0.03)
    ids = [40] * 10
    assert me.complete(ids, max_tokens=38).status_code == 200
    assert me.front.specs[-1].sampling.max_tokens == 38
    error = refusal(me.complete(ids, max_tokens=39), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "request_too_large")
    assert "48 tokens" in error["message"]
    assert refusal(me.complete([40] * 48, max_tokens=1), 400)["param"] == "prompt"
    said = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
    assert me.http.post("/v1/chat/completions", json=said).status_code == 200
    spec = me.front.specs[-1]
    assert len(spec.prompt_ids) + spec.sampling.max_tokens == 48
    assert other.complete(ids, max_tokens=100).status_code == 200


def test_what_was_not_used_comes_back(house: Any) -> None:
    me, _ = house(tokens_per_minute=100)
    me.front.script = speak("abc stop")
    for _ in range(3):
        answer = me.complete([40] * 10, max_tokens=30, stop="stop")
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] < 25
    me.front.script = speak("x")
    refusal(me.complete([40] * 10, max_tokens=80), 429)


def test_a_refused_request_costs_nothing(house: Any) -> None:
    me, _ = house(tokens_per_minute=100, max_requests=4)
    for _ in range(3):
        refusal(me.complete([400] * 10, max_tokens=80))
        refusal(me.complete([40] * 10, max_tokens=80, model="nobody"), 404)
        refusal(me.complete([40] * 10, max_tokens=500))
        refusal(me.complete([40] * 10, max_tokens=80, logit_bias={"320": 1}))
    assert me.complete([40] * 10, max_tokens=90).status_code == 200


def test_the_eleventh_upload(house: Any) -> None:
    me, other = house()
    head = (
        b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\nauthorization: %s\r\n"
        b"content-type: multipart/form-data; boundary=B\r\n\r\n"
        % me.http.headers["authorization"].encode()
    )
    begun = NAME + CONF + part("weights", b"half")[:-2]
    raws = []
    for _ in range(MAX_UPLOADS):
        raw = wire.connect(me)
        raw.sendall(head + begun)
        raws.append(raw)
    writers = me.front.adapters.writers
    assert eventually(lambda: len(writers) == MAX_UPLOADS)

    def upload(who: Running) -> Any:
        body = NAME + CONF + part("weights", b"w") + END
        headers = {"content-type": "multipart/form-data; boundary=B"}
        return who.http.post("/v1/adapters?wait=5", content=body, headers=headers)

    answer = upload(me)
    assert refusal(answer, 429)["code"] == "rate_limit_exceeded" and answer.headers["retry-after"]
    assert len(writers) == MAX_UPLOADS, "nothing was written"
    assert upload(other).status_code == 201
    raws[3].close()
    assert eventually(lambda: upload(me).status_code == 201)
    for raw in raws:
        raw.close()


def test_keys_of_one_tenant_share_its_limits(house: Any, tmp_path: Path) -> None:
    me, _ = house(tokens_per_minute=100)
    second = grant(tmp_path / "keys.json", "acme")
    me.front.keys._checked_at = float("-inf")
    assert me.complete([40] * 10, max_tokens=80).status_code == 200
    body = {"model": "base", "prompt": [40] * 10, "max_tokens": 80}
    refusal(me.http.post("/v1/completions", json=body, headers=bearer(second)), 429)
