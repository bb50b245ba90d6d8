"""Fifty clients over real sockets that never read, beside four that do."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Start
from tests.http.fake_front import LONG, eventually, tokens

from loramux.front.generation import GenerationSpec
from loramux.http.connection import BoundedConnection

STUCK, READERS = 50, 4
TOKENS = 2000
HIGH_WATER = 64 << 10
"""Where asyncio tells a writer to wait."""


class Watched:
    """A transport with little room in the system, and in ``most`` how much waited before a write,
    by the client's port."""

    def __init__(self, transport: Any, most: dict[int, int]) -> None:
        self._transport, self._most = transport, most
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._port = raw.getpeername()[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        waits = self._transport.get_write_buffer_size()
        self._most[self._port] = max(self._most.get(self._port, 0), waits)
        self._transport.write(data)


def test_clients_that_never_read_are_cut_off_and_cost_nobody_a_token(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BoundedConnection.connection_made
    most: dict[int, int] = {}

    def connection_made(self: BoundedConnection, transport: Any) -> None:
        made(self, Watched(transport, most))  # type: ignore[arg-type]

    monkeypatch.setattr(BoundedConnection, "connection_made", connection_made)
    server = start(write_timeout_s=2)
    server.front.info = LONG
    asked = {"model": "base", "prompt": "the dog", "stream": True, "logprobs": 5}
    asked["max_tokens"] = TOKENS

    async def script(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        """Those that are stuck asked for one token more, which does not come."""
        for _ in range(TOKENS):
            yield tokens("y")
        await asyncio.sleep(3600)

    server.front.script = script

    def read() -> list[Any]:
        raw = wire.post(server, "/v1/completions", **asked)
        raw.settimeout(60)
        return wire.events(wire.read_until(raw, b"0\r\n\r\n"))

    more = asked | {"max_tokens": TOKENS + 1}
    stuck = [wire.post(server, "/v1/completions", small_buffer=True, **more) for _ in range(STUCK)]
    ports = {raw.getsockname()[1] for raw in stuck}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda _: read(), range(READERS)):
            assert found[-1] is None, "the end, and no error"
            pieces = [event["choices"][0] for event in found[:-1]]
            assert pieces[-1]["finish_reason"] == "length"
            seen = [piece["logprobs"]["tokens"] for piece in pieces if piece["logprobs"]]
            assert sum(map(len, seen)) == TOKENS
    assert ports <= most.keys()
    assert max(most[port] for port in ports) <= HIGH_WATER, "and the chunk that went over it"
    assert eventually(lambda: len(server.front.aborted) == STUCK, within_s=60)
    assert eventually(lambda: not len(server.front.ledger) and server.front.room.choices == 0)
    for raw in stuck:
        assert b"[DONE]" not in wire.read_all(raw)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The clients' ports of the connections that the server has lost, as it loses them. The system
    takes little from it."""
    made, loses = BoundedConnection.connection_made, BoundedConnection.connection_lost
    ports = set()

    def connection_made(self: BoundedConnection, transport: asyncio.Transport) -> None:
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    def connection_lost(self: BoundedConnection, exc: Exception | None) -> None:
        assert self.client is not None
        ports.add(self.client[1])
        loses(self, exc)

    monkeypatch.setattr(BoundedConnection, "connection_made", connection_made)
    monkeypatch.setattr(BoundedConnection, "connection_lost", connection_lost)
    return ports


WHOLE = {"model": "base", "prompt": "a", "max_tokens": 20_000, "logprobs": 5}
"""Its answer is of 1.6 MB."""
LITTLE = WHOLE | {"max_tokens": 600}
"""Its answer is of 48 KB, for which no writer is told to wait."""


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("asked", [WHOLE, LITTLE], ids=["large", "small"])
def test_a_whole_answer_that_nobody_reads_is_dropped(
    start: Start, lost: set[int], asked: dict[str, Any], kept: bool
) -> None:
    """Also once the request is over, when the server would hold it for ever."""
    server = start(write_timeout_s=0.5)
    server.front.info = LONG
    raw = wire.connect(server, small_buffer=True)
    headers = ["content-type: application/json", *([] if kept else ["connection: close"])]
    raw.sendall(wire.request("/v1/completions", json.dumps(asked).encode(), *headers))
    assert eventually(lambda: server.front.snapshot.finished.get("length") == 1, within_s=30)
    assert eventually(lambda: raw.getsockname()[1] in lost, within_s=20)
