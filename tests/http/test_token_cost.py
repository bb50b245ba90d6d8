"""What a streamed token may cost the front, in things that can be counted: one write to the socket
of its stream, and no task, timer or thread of its own."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.fake_front import FakeFront, tokens
from uvicorn.server import ServerState

from loramux.config import ServerConfig
from loramux.front.generation import GenerationSpec
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config
from loramux.wire import Finished, Output, StepDone

STREAMS, STEPS = 5, 40
WORD = tokens("a")[0]


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts what is made on it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def create_task(self, *args: Any, **kwargs: Any) -> Any:
        self.made["task"] += 1
        return super().create_task(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> Any:
        self.made["timer"] += 1
        return super().call_at(*args, **kwargs)

    def run_in_executor(self, *args: Any) -> Any:
        self.made["thread"] += 1
        return super().run_in_executor(*args)


class Socket(asyncio.Transport):
    """A client that takes everything at once; ``writes`` are the pieces as they came."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: Any = None, low: Any = None) -> None: ...


async def waits_for_the_test(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
    await asyncio.get_running_loop().create_future()
    yield []


async def turns(num: int) -> None:
    """Some turns of the loop; no timer is made for them."""
    for _ in range(num):
        await asyncio.sleep(0)


BODIES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


class Streams:
    """Some streams of one front, begun, over sockets that are none."""

    def __init__(self, model_dir: Path, path: str) -> None:
        config = ServerConfig(model=model_dir, port=0)
        self.front = FakeFront(config, model_dir)
        self.front.script = waits_for_the_test
        self.server = ServerState()
        self.sockets = [Socket() for _ in range(STREAMS)]
        self.connections: list[Any] = []
        settings = uvicorn_config(build_app(self.front, config), config, port=0)  # type: ignore[arg-type]
        settings.load()
        asked = {"model": "base", "stream": True, "max_tokens": STEPS, **BODIES[path]}
        for socket in self.sockets:
            connection = settings.http_protocol_class(settings, self.server, {})  # type: ignore[call-arg]
            connection.connection_made(socket)  # type: ignore[arg-type]
            connection.data_received(
                wire.request(path, json.dumps(asked).encode(), "content-type: application/json")
            )
            self.connections.append(connection)

    async def begin(self) -> None:
        """All have their heads, and with them the first token."""
        async with asyncio.timeout(10):
            while len(self.front.specs) < STREAMS:
                await asyncio.sleep(0.001)
            self.step(0)
            while not all(socket.writes for socket in self.sockets):
                await asyncio.sleep(0.001)
        await turns(10)

    def step(self, step: int) -> None:
        """A token for every stream, and after the last one the end."""
        ids = [spec.request_id for spec in self.front.specs]
        done = StepDone(engine_epoch=1, step=step)
        done.outputs = [Output(request_id, step, [WORD]) for request_id in ids]
        if step == STEPS - 1:
            done.finished = [Finished(request_id, "length") for request_id in ids]
        self.front.ledger.apply(done)

    def writes(self) -> list[int]:
        return [len(socket.writes) for socket in self.sockets]

    async def end(self) -> None:
        for connection in self.connections:
            connection.connection_lost(None)
        for task in self.server.tasks:
            task.cancel()
        await asyncio.gather(*self.server.tasks, return_exceptions=True)
        await self.front.stop()


@pytest.mark.parametrize("path", BODIES)
def test_a_token_is_one_write_and_nothing_else(model_dir: Path, path: str) -> None:
    loop = CountingLoop()

    async def body() -> None:
        streams = Streams(model_dir, path)
        await streams.begin()
        loop.made.clear()
        for step in range(1, STEPS - 1):
            before = streams.writes()
            streams.step(step)
            await turns(5)
            assert streams.writes() == [num + 1 for num in before]
        assert not loop.made, loop.made
        streams.step(STEPS - 1)
        await turns(20)
        for socket in streams.sockets:
            events = wire.events(b"".join(socket.writes))
            pieces = [event["choices"][0] for event in events[:-1]]
            texts = [piece.get("text") or piece.get("delta", {}).get("content") for piece in pieces]
            assert events[-1] is None and "".join(text or "" for text in texts) == "a" * STEPS
        await streams.end()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(body())


def test_what_comes_while_the_client_leaves_is_not_written(model_dir: Path) -> None:
    async def body() -> None:
        streams = Streams(model_dir, "/v1/completions")
        await streams.begin()
        before = streams.writes()
        streams.step(1)
        streams.connections[0].connection_lost(None)
        await turns(20)
        assert streams.writes() == [before[0], *(num + 1 for num in before[1:])]
        assert streams.front.aborted == [streams.front.specs[0].request_id]
        await streams.end()

    asyncio.run(body())
