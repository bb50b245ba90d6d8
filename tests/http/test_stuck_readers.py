"""Fifty clients over real sockets that never read, beside four that do."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from tests.http import wire
from tests.http.conftest import Start
from tests.http.fake_front import INFO, eventually

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
    server.front.info = msgspec.structs.replace(INFO, max_model_len=1_000_000)
    asked = {"model": "base", "prompt": "the dog", "stream": True, "logprobs": 5}
    asked["max_tokens"] = TOKENS

    def read() -> list[Any]:
        raw = wire.post(server, "/v1/completions", **asked)
        raw.settimeout(60)
        return wire.events(wire.read_until(raw, b"0\r\n\r\n"))

    stuck = [wire.post(server, "/v1/completions", small_buffer=True, **asked) for _ in range(STUCK)]
    ports = {raw.getsockname()[1] for raw in stuck}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda _: read(), range(READERS)):
            assert found[-1] is None, "the end, and no error"
            pieces = [event["choices"][0] for event in found[:-1]]
            assert pieces[-1]["finish_reason"] == "length"
            tokens = [piece["logprobs"]["tokens"] for piece in pieces if piece["logprobs"]]
            assert sum(map(len, tokens)) == TOKENS
    assert ports <= most.keys()
    assert max(most[port] for port in ports) <= HIGH_WATER, "and the chunk that went over it"
    assert eventually(lambda: len(server.front.aborted) == STUCK, within_s=60)
    assert eventually(lambda: not len(server.front.ledger) and server.front.room.choices == 0)
    for raw in stuck:
        assert b"[DONE]" not in wire.read_all(raw)
