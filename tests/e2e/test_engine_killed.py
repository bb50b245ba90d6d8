"""The real server, whose engine is killed again and again while it answers: nobody can tell from
the answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from tests import tiny
from tests.e2e.poisoned_engine import POISON
from tests.e2e.server import Server

NUM_STREAMS = 32
MAX_TOKENS = 160
ENGINE = "tests.e2e.poisoned_engine"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("killed")
    model = tiny.write_model(folder / "tiny")
    small = tiny.write_model(
        folder / "small", seed=1, hidden_size=32, num_hidden_layers=1, head_dim=8
    )
    flags = ["--small-model", str(small)]
    for number in range(2):
        adapter = tiny.write_adapter(folder / f"a{number}", model, r=4, seed=number)
        flags += ["--adapter", f"a{number}={adapter}"]
    server = Server(model, folder / "data", *flags, command="tests.e2e.poisonable")
    yield server
    assert server.close() == 0


def request(number: int) -> dict[str, Any]:
    """All kinds of requests that a death could change."""
    body: dict[str, Any] = {
        "model": ("tiny", "a0", "a1")[number % 3],
        "prompt": [5 + number, 6, 7 + number, 8] * (1 + number % 5),
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "seed": number,
        "temperature": (0.0, 1.0)[number % 2],
        "return_token_ids": True,
        "speculation": ("auto", "off")[number // 2 % 2],
    }
    match number % 8:
        case 1:
            body |= {"model": "tiny", "entropy_adaptive": {"threshold": 4.0}}
        case 2:
            body |= {"n": 2, "logprobs": 2}
        case 3:
            body |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "top_p": 0.9}
        case 4:
            body |= {"echo": True, "logprobs": 1, "stop": ["e", "\u0012"], "min_tokens": 100}
        case 5:
            body |= {
                "model": "tiny",
                "entropy_adaptive": {"threshold": 5.5, "window": 3, "min_dwell": 4},
            }
    return body


class Clients:
    """Ask everything at once; ``heard`` counts the events that came."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.AsyncClient(base_url=server.url, timeout=300)
        self.heard = 0
        self.busy = True

    async def all(self) -> list[Any]:
        try:
            return await asyncio.gather(*map(self.ask, map(request, range(NUM_STREAMS))))
        finally:
            self.busy = False

    async def ask(self, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """What every choice came to, and the usage (as -1)."""
        choices: dict[int, dict[str, Any]] = {}
        parts: list[dict[str, Any]] = []
        while not parts:
            if body["seed"] % 6 == 0:
                answer = await self.http.post("/v1/completions", json=body)
                if not _refused(answer):
                    parts = [answer.json()]
            else:
                parts = [part async for part in self._stream(body)]
        for part in parts:
            for choice in part["choices"]:
                _merge(choices.setdefault(choice["index"], {}), choice)
        usage = parts[-1]["usage"]
        choices[-1] = {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
        return choices

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        done = 0
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if _refused(answer):
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done += 1
                elif line.startswith("data: "):
                    self.heard += 1
                    part = json.loads(line.removeprefix("data: "))
                    assert "error" not in part, part
                    yield part
        assert done == 1


def _refused(answer: httpx.Response) -> bool:
    """Whether it came while no engine was there: then it is asked again, as clients do."""
    assert answer.status_code in (200, 503)
    assert answer.status_code == 200 or "retry-after" in answer.headers
    return answer.status_code == 503


def _merge(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    for key, value in choice.items():
        if isinstance(value, dict):
            _merge(whole.setdefault(key, {}), value)
        elif isinstance(value, str | list) and key not in ("finish_reason", "stop_reason"):
            whole[key] = whole[key] + value if key in whole else value
        elif value is not None and key != "index":
            assert whole.get(key) is None, f"{key} came twice"
            whole[key] = value


async def kill(server: Server, clients: Clients, rng: random.Random, most: int) -> int:
    """Kill the engine at random moments of an answer, up to ``most`` times; how often it was."""
    for number in range(most):
        until = clients.heard + rng.randrange(2, 700)
        while clients.heard < until:
            if not clients.busy:
                return number
            await asyncio.sleep(0)
        engine = server.child(ENGINE)
        os.kill(engine, signal.SIGKILL)
        await _restarted(server, clients.http, engine)
    return most


async def _restarted(server: Server, http: httpx.AsyncClient, old: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):  # there is none between two
            another = server.child(ENGINE) != old
            if another and (await http.get("/health/ready")).status_code == 200:
                return
        await asyncio.sleep(0.05)
    raise AssertionError("no other engine came")


def check_balance(server: Server) -> None:
    """Idle, every frame is free, of an adapter, or of the prefix cache."""

    def balanced() -> bool:
        frames = server.http.get("/v1/capacity").json()["frames"]
        owned = sum(frames[owner] for owner in ("prefix", "adapter_leased", "adapter_warm"))
        return bool(frames["kv"] == 0 and frames["free"] + owned == frames["total"])

    eventually(balanced)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def compare(server: Server, rng: random.Random, most: int) -> int:
    calm, killed = Clients(server), Clients(server)
    expected = await calm.all()
    assert {choice["finish_reason"] for choice in expected[4].values() if len(choice) > 2} == {
        "stop"
    }
    killing = asyncio.create_task(kill(server, killed, rng, most))
    answers = await killed.all()
    for number, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        assert answer == right, number
    count = await killing
    check_balance(server)
    await calm.http.aclose()
    await killed.http.aclose()
    return count


def test_an_engine_killed_three_times_is_a_pause(server: Server) -> None:
    """Takes 30 s and more: it starts four engines."""
    assert asyncio.run(compare(server, random.Random(1), 3)) == 3
    assert server.metric("loramux_requests_resumed_total") > 0
    assert server.metric("loramux_request_failed_total") == 0


def test_a_request_that_ends_every_engine_is_failed_alone(server: Server) -> None:
    """Takes 15 s and more: it ends two engines."""
    answer = server.complete("tiny", POISON, max_tokens=4)
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["code"] == "poison_request"
    assert answer.headers["x-should-retry"] == "false"
    server.await_ready()
    assert server.complete("tiny", [5, 6], max_tokens=4).status_code == 200


@pytest.mark.slow
def test_the_poison_among_many_is_failed_alone(server: Server) -> None:
    async def main() -> None:
        clients = Clients(server)
        expected = await clients.all()
        asked, before = asyncio.create_task(clients.all()), clients.heard
        while clients.heard == before:
            await asyncio.sleep(0)
        body = {"model": "tiny", "prompt": POISON, "max_tokens": 4}
        answer = await clients.http.post("/v1/completions", json=body)
        assert answer.json()["error"]["code"] == "poison_request"
        assert await asked == expected
        await clients.http.aclose()

    before = server.metric("loramux_engine_restarts_total")
    asyncio.run(main())
    deaths = server.metric("loramux_engine_restarts_total") - before
    assert deaths <= 9, "log2(33 + 7 choices) + 3"
    server.await_ready()
    check_balance(server)


@pytest.mark.slow
def test_an_engine_that_hangs_is_replaced(server: Server) -> None:
    """Stopped from outside: it is silent for five seconds, and ended then."""
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "seed": 3}
    expected = server.complete("tiny", **body).json()["choices"]
    before = server.metric("loramux_engine_restarts_total")

    async def main() -> Any:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            body_ = {"model": "tiny", **body}
            asked = asyncio.create_task(http.post("/v1/completions", json=body_))
            await asyncio.sleep(0.05)
            os.kill(server.child(ENGINE), signal.SIGSTOP)
            return (await asked).json()["choices"]

    assert asyncio.run(main()) == expected
    eventually(lambda: server.metric("loramux_engine_restarts_total") == before + 1)
    server.await_ready()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills(server: Server) -> None:
    """Takes minutes: fifty engines."""
    rng, kills = random.Random(2), 0
    while kills < 50:
        kills += asyncio.run(compare(server, rng, 50 - kills))
