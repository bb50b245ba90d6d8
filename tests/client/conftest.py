"""Clients of either kind over a server that is a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.client.doubles import Both, Kind

from loramux_client import _client

Handler = Callable[[httpx.Request], httpx.Response]
Connect = Callable[..., Both]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds the client would have slept."""
    seconds: list[float] = []

    async def sleep(value: float) -> None:
        seconds.append(value)

    monkeypatch.setattr(_client, "time", SimpleNamespace(sleep=seconds.append))
    monkeypatch.setattr(_client, "asyncio", SimpleNamespace(sleep=sleep))
    return seconds


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, pauses: list[float]) -> Iterator[Connect]:
    """``connect(handler, **options)`` gives a client of either kind whose server is ``handler``."""
    kind: Kind = request.param
    opened: list[Both] = []

    def make(handler: Handler, **options: Any) -> Both:
        opened.append(Both(kind, transport=httpx.MockTransport(handler), **options))
        return opened[-1]

    yield make
    for both in opened:
        both.close()
