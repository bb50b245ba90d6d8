"""Two hundred clients that stop reading, over sockets that are none: what waits has a bound, they
are cut off at the write deadline, and whoever reads notices nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.http import wire
from tests.http.fake_front import FakeFront
from tests.http.test_token_cost import WORD, Socket, turns, waits_for_the_test
from uvicorn.server import ServerState

from loramux.config import ServerConfig
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config
from loramux.wire import Finished, Output, StepDone

STUCK, STEPS = 200, 60
HIGH_WATER = 10


class Full(Socket):
    """A socket whose buffers are full after HIGH_WATER pieces; ``protocol`` writes to it."""

    protocol: Any = None
    aborted = False

    def write(self, data: Any) -> None:
        super().write(data)
        if len(self.writes) == HIGH_WATER:
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.writes[HIGH_WATER - 1 :]))

    def abort(self) -> None:
        if not self.aborted:
            self.aborted = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


def test_two_hundred_clients_that_do_not_read(model_dir: Path) -> None:
    async def body() -> None:
        config = ServerConfig(model=model_dir, port=0, write_timeout_s=0.5)
        front = FakeFront(config, model_dir)
        front.script = waits_for_the_test
        settings = uvicorn_config(build_app(front, config), config, port=0)  # type: ignore[arg-type]
        settings.load()
        state = ServerState()
        asked = {"model": "base", "prompt": "a", "stream": True, "max_tokens": STEPS}
        request = wire.request(
            "/v1/completions", json.dumps(asked).encode(), "content-type: application/json"
        )
        sockets: list[Any] = [Full() for _ in range(STUCK)] + [Socket()]
        for socket in sockets:
            connection = settings.http_protocol_class(settings, state, {})  # type: ignore[call-arg]
            socket.protocol = connection
            connection.connection_made(socket)
            connection.data_received(request)
        reader = sockets[-1]
        async with asyncio.timeout(60):
            while len(front.specs) <= STUCK or not all(socket.writes for socket in sockets):
                await asyncio.sleep(0.001)
        ids = [spec.request_id for spec in front.specs]
        for step in range(STEPS - 1):
            done = StepDone(engine_epoch=1, step=step)
            done.outputs = [Output(request_id, step, [WORD]) for request_id in ids]
            front.ledger.apply(done)
            await turns(5)
        waiting = [entry.generation._unread for entry in front.ledger._entries.values()]
        merged = [delta for delta in waiting if delta is not None]
        assert max(len(socket.writes) for socket in sockets[:-1]) <= HIGH_WATER + 1
        assert len(reader.writes) >= STEPS - 1, "nobody else waits"
        assert all(len(delta.token_ids) < STEPS for delta in merged), "its own output at most"
        async with asyncio.timeout(60):
            while len(front.aborted) < STUCK:
                await asyncio.sleep(0.01)
        assert all(socket.aborted for socket in sockets[:-1])
        [last] = [entry.spec.request_id for entry in front.ledger.unfinished()]
        done = StepDone(engine_epoch=1, step=STEPS)
        done.outputs = [Output(last, STEPS - 1, [WORD])]
        done.finished = [Finished(last, "length")]
        front.ledger.apply(done)
        await turns(20)
        assert wire.events(b"".join(reader.writes))[-1] is None
        assert len(front.aborted) == STUCK and front.room.choices == 0
        reader.protocol.connection_lost(None)
        await asyncio.gather(*state.tasks, return_exceptions=True)
        await front.stop()

    asyncio.run(body())
