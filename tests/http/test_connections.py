"""How many connections there may be, over sockets that are none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.http.fake_front import FakeFront
from tests.http.test_token_cost import Socket
from uvicorn.server import ServerState

from loramux.config import ServerConfig
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config


class Closable(Socket):
    """One that is closing from ``abort`` on; that it is lost is for the test to say."""

    closing = False

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True


class House:
    """A server of at most ``most`` connections, all of which come when ``connect`` says so."""

    def __init__(self, model_dir: Path, most: int) -> None:
        config = ServerConfig(model=model_dir, port=0, max_connections=most)
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
