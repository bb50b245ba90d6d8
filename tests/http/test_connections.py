"""How many connections there may be and how long they may take, over sockets that are none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.fake_front import FakeFront
from tests.http.test_token_cost import Socket, waits_for_the_test
from uvicorn.server import ServerState

from loramux.config import ServerConfig
from loramux.http.app import build_app
from loramux.http.connection import STRIDE, uvicorn_config


class Closable(Socket):
    """One that is closing from ``abort`` on; that it is lost is for the test to say."""

    closing = False

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True


class House:
    """A server of at most ``most`` connections, all of which come when ``connect`` says so."""

    def __init__(self, model_dir: Path, most: int, **settings: Any) -> None:
        config = ServerConfig(model=model_dir, port=0, max_connections=most, **settings)
        self.front = FakeFront(config, model_dir)
        self.settings = uvicorn_config(build_app(self.front, config), config, port=0)  # type: ignore[arg-type]
        self.settings.load()
        self.state = ServerState()
        self.connections: list[Any] = []

    def connect(self, socket: Closable) -> None:
        make: Any = self.settings.http_protocol_class
        self.connections.append(make(self.settings, self.state, {}))
        self.connections[-1].connection_made(socket)

    async def close(self) -> None:
        for connection in self.connections:
            connection.connection_lost(None)
        await self.front.stop()


def test_who_is_closing_already_is_not_one_too_many(model_dir: Path) -> None:
    async def body() -> None:
        house, sockets = House(model_dir, 3), [Closable() for _ in range(5)]
        sockets[0].closing = True
        for socket in sockets[:4]:
            house.connect(socket)
        assert [socket.closing for socket in sockets] == [True, False, False, False, False]
        house.connect(sockets[4])
        assert [socket.closing for socket in sockets] == [True, True, False, False, False]
        await house.close()

    asyncio.run(body())


def test_of_those_that_came_at_the_same_time_the_first_gives_way(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1.0)
        house, sockets = House(model_dir, 20), [Closable() for _ in range(23)]
        for socket in sockets:
            house.connect(socket)
        assert [socket.closing for socket in sockets] == [True] * 3 + [False] * 20
        monkeypatch.undo()
        await house.close()

    asyncio.run(body())


class Behind(Closable):
    """``waits`` bytes are not with the system yet."""

    waits = 0

    def get_write_buffer_size(self) -> int:
        return self.waits


@pytest.mark.parametrize(("waits", "in_time"), [(0, True), (1, False)])
def test_who_has_read_its_answer_may_take_its_time(
    model_dir: Path, waits: int, in_time: bool
) -> None:
    async def body() -> None:
        house, socket = House(model_dir, 1, write_timeout_s=0.05), Behind()
        house.connect(socket)
        socket.waits = waits
        house.connections[0].data_received(wire.request("/health/live", b"", method="GET"))
        while not socket.writes:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.15)
        assert socket.closing is not in_time
        await house.close()

    asyncio.run(body())


class Draining(Behind):
    """``taken`` bytes are between one look and the next."""

    taken = 0

    def get_write_buffer_size(self) -> int:
        self.waits = max(0, self.waits - self.taken)
        return self.waits


@pytest.mark.parametrize(("taken", "fast_enough"), [(STRIDE, True), (STRIDE - 1, False)])
def test_each_stride_has_its_time_and_not_the_whole(
    model_dir: Path, taken: int, fast_enough: bool
) -> None:
    async def body() -> None:
        house, socket = House(model_dir, 1, write_timeout_s=0.01), Draining()
        house.connect(socket)
        socket.waits, socket.taken = 10 * STRIDE, taken
        house.connections[0].data_received(wire.request("/health/live", b"", method="GET"))
        async with asyncio.timeout(60):
            while socket.waits and not socket.closing:
                await asyncio.sleep(0.001)
        assert socket.closing is not fast_enough
        await house.close()

    asyncio.run(body())


def test_the_answer_before_does_not_count_against_who_reads_the_next(model_dir: Path) -> None:
    """What was written just now is not with the system yet when the time of the answer before is
    over."""

    async def body() -> None:
        house, socket = House(model_dir, 1, write_timeout_s=0.05), Behind()
        house.connect(socket)
        [connection] = house.connections
        connection.data_received(wire.request("/health/live", b"", method="GET"))
        while not socket.writes:
            await asyncio.sleep(0.001)
        house.front.script = waits_for_the_test
        asked = json.dumps({"model": "base", "prompt": "a", "stream": True}).encode()
        connection.data_received(
            wire.request("/v1/completions", asked, "content-type: application/json")
        )
        socket.waits = 100
        await asyncio.sleep(0.15)
        assert house.front.specs and not socket.closing
        await house.close()

    asyncio.run(body())
