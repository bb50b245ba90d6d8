"""A real uvicorn on a free port, in a thread, over a scripted front."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.front.model_dir import write_model
from tests.http import wire
from tests.http.fake_front import FakeFront

from loramux.config import ServerConfig
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config


@dataclass
class Running:
    """A server that answers."""

    front: FakeFront
    port: int
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any = "the dog", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **{"model": "base", "prompt": prompt, **body})

    def chat(self, content: Any = "hello", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", **{"model": "base", "messages": messages, **body})

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no {name}")


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("http") / "model")


@pytest.fixture(autouse=True)
def sockets() -> Iterator[None]:
    """Closes what a test opened by hand."""
    yield
    wire.close_all()


@pytest.fixture
def start(model_dir: Path) -> Iterator[Start]:
    """``start(**config)``: a server of its own for one test."""
    stops = []

    def start(**settings: Any) -> Running:
        running, stop = launch(model_dir, **settings)
        stops.append(stop)
        return running

    yield start
    for stop in stops:
        stop()


@pytest.fixture(scope="module")
def shared(model_dir: Path) -> Iterator[Running]:
    """One server for every test of a module that leaves it as it was."""
    running, stop = launch(model_dir)
    yield running
    stop()


def launch(model_dir: Path, **settings: Any) -> tuple[Running, Callable[[], None]]:
    config = ServerConfig(model=model_dir, port=0, **settings)
    return serve(FakeFront(config, model_dir), config)


def serve(front: Any, config: ServerConfig) -> tuple[Running, Callable[[], None]]:
    """A server over any front, and what stops it."""
    server = uvicorn.Server(uvicorn_config(build_app(front, config), config, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.005)
    running = Running(front, server.servers[0].sockets[0].getsockname()[1])

    def stop() -> None:
        running.http.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

    return running, stop
