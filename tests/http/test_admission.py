"""Nobody who was tokenized is refused for want of room, and nobody who is refused is tokenized."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.granting import client, grant

from loramux.front.generation import GenerationSpec
from loramux.front.keys import Limits, editing

BURST = 40


class Gate:
    """Engine and tokenizer wait until it is opened; ``encoded`` are the texts that were begun."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = False
        self.encoded: list[str] = []
        tokenizer = server.front.tokenizer
        encode = tokenizer.encode

        async def counted(text: str, add_special_tokens: bool = True, **bounds: Any) -> list[int]:
            self.encoded.append(text)
            await self.opened()
            return await encode(text, add_special_tokens, **bounds)

        async def script(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
            await self.opened()
            yield []

        monkeypatch.setattr(tokenizer, "encode", counted)
        server.front.script = script

    async def opened(self) -> None:
        while not self.open:
            await asyncio.sleep(0.005)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(BURST) as pool:
        yield pool


def burst(pool: ThreadPoolExecutor, server: Running, gate: Gate, **body: Any) -> list[Any]:
    """The answers to BURST requests at once; the gate is opened when nobody else can be refused."""

    def ask(number: int) -> httpx.Response:
        answer = server.complete(f"{number:02} " + "a" * 57, max_tokens=16, **body)
        return answer

    asked = [pool.submit(ask, number) for number in range(BURST)]
    while sum(each.done() for each in asked) + len(gate.encoded) < BURST:
        pass
    gate.open = True
    return [each.result() for each in asked]


def check(answers: list[httpx.Response], gate: Gate, num: int, status: int = 503) -> None:
    good = [answer for answer in answers if answer.status_code == 200]
    assert len(good) == num == len(gate.encoded), "no more and no fewer than were tokenized"
    for answer in answers:
        if answer not in good:
            assert answer.status_code == status, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-should-retry"] == "true"


def test_places(start: Start, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    server.front.room.places = 6
    gate = Gate(server, monkeypatch)
    check(burst(pool, server, gate), gate, 6)
    assert server.front.snapshot.rejected == {"overloaded": BURST - 6}
    assert server.front.reserved == server.front.room.tokens == 0


def test_tokens(start: Start, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimated as 20 + 16 each, they turn out to be 60 + 16: what lacks is borne."""
    server = start()
    server.front.room.max_tokens = 300
    gate = Gate(server, monkeypatch)
    check(burst(pool, server, gate), gate, 7)
    assert server.front.room.tokens == 0


def test_a_tenants_minute(
    start: Start, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = grant(tmp_path / "keys.json", "acme")
    with editing(tmp_path / "keys.json") as content:
        content.tenants["acme"] = Limits(tokens_per_minute=6 * 36)
    server = start(api_keys=tmp_path / "keys.json")
    server.front.quotas._clock = lambda: 0.0
    gate = Gate(server, monkeypatch)
    answers = burst(pool, client(server, key), gate)
    check(answers, gate, 6, 429)
    used = sum(a.json()["usage"]["total_tokens"] for a in answers if a.status_code == 200)
    assert used > 6 * 70
    assert server.front.quotas._buckets["acme"].level == 6 * 36 - used


def test_after_tokenization_only_the_context_may_refuse(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    gate = Gate(server, monkeypatch)
    gate.open = True
    server.front.room.max_tokens = 50
    answer = server.complete("a" * 500, max_tokens=16)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded" and len(gate.encoded) == 1
    assert server.complete("a" * 100, max_tokens=16).status_code == 200
    assert server.chat("a" * 50).status_code == 200
    assert server.front.room.tokens == 0


def test_who_only_asks_for_tokens_needs_a_place_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    server.front.room.places = 0
    gate = Gate(server, monkeypatch)
    gate.open = True
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert server.post(path, **body).status_code == 400
        server.front.room.places = 1
        assert server.post(path, **body).status_code == 200
        server.front.room.places = 0
    assert gate.encoded == ["a"]


def test_large_bodies_that_do_not_end_leave_room_for_small_ones(start: Start) -> None:
    """Eight thousand bytes may lie unparsed: bodies of 900 come in while as many are free."""
    server = start(max_body_bytes=1000)
    body = b'{"model": "base", "prompt": "a", "max_tokens": 1, "user": "%b"}'
    body = body.replace(b"%b", b"u" * (1000 - len(body) + 2))
    request = wire.request("/v1/completions", body, "content-type: application/json")
    head = len(request) - len(body)
    raws = [wire.connect(server) for _ in range(20)]
    for raw in raws:
        raw.sendall(request[: head + 900])
    refused = []
    while len(refused) < 12:
        readable, _, _ = select.select([raw for raw in raws if raw not in refused], [], [], 10)
        assert readable, "what is over is refused at once"
        refused += readable
    for raw in refused:
        answer = wire.read_until(raw, b"}}")
        assert wire.status(answer) == 503 and b"retry-after" in answer
    assert server.complete("a", max_tokens=1).status_code == 200
    for raw in raws:
        if raw not in refused:
            raw.sendall(request[head + 900 :])
            assert wire.status(wire.read_until(raw, b"usage")) == 200
    assert server.complete("a" * 100, user="u" * 700, max_tokens=1).status_code == 200


def test_without_a_place_nothing_of_a_body_is_awaited(start: Start) -> None:
    """A flood is answered by its first lines; the bodies of these never come."""
    server = start()
    server.front.room.places = 0
    for path in ("/v1/completions", "/v1/chat/completions"):
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n"
        raw = wire.connect(server)
        raw.sendall(head.encode())
        answer = wire.read_until(raw, b"}}")
        assert wire.status(answer) == 503 and b"retry-after" in answer
        raw.close()
    assert server.http.get("/v1/models").status_code == 200
