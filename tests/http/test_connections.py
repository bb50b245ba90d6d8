"""How many connections there may be, over sockets that are none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

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


def test_who_is_closing_already_is_not_one_too_many(model_dir: Path) -> None:
    async def body() -> None:
        config = ServerConfig(model=model_dir, port=0, max_connections=3)
        front = FakeFront(config, model_dir)
        settings = uvicorn_config(build_app(front, config), config, port=0)  # type: ignore[arg-type]
        settings.load()
        state = ServerState()
        sockets: list[Any] = [Closable() for _ in range(5)]
        connections = [
            settings.http_protocol_class(settings, state, {})  # type: ignore[call-arg]
            for _ in sockets
        ]
        sockets[0].closing = True
        for connection, socket in zip(connections[:4], sockets, strict=False):
            connection.connection_made(socket)
        assert [socket.closing for socket in sockets] == [True, False, False, False, False]
        connections[4].connection_made(sockets[4])
        assert [socket.closing for socket in sockets] == [True, True, False, False, False]
        for connection in connections:
            connection.connection_lost(None)
        await front.stop()

    asyncio.run(body())
