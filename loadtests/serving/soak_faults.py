"""The faults of a soak. Each gives None, or what was wrong about how the server took it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
import msgspec

if TYPE_CHECKING:
    from soak import Log
    from tests.e2e.server import Server

LONG = {"model": "a1", "prompt": "Once", "max_tokens": 150, "stream": True, "ignore_eos": True}
READY_WITHIN_S = 240.0
GRACE_S = 5.0
"""After an engine is ready again: what still ends then because of the death before."""


async def kill_engine(server: Server, log: Log) -> str | None:
    """kill -9; the next engine has to be ready in time."""
    begin = log.now()
    old = await asyncio.to_thread(server.child, "loramux.engine.main")
    os.kill(old, signal.SIGKILL)
    log.down.append((begin, begin + READY_WITHIN_S))
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        end = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                new = await asyncio.to_thread(server.child, "loramux.engine.main")
                answer = await http.get("/health/ready")
                if new != old and answer.status_code == 200:
                    await asyncio.sleep(GRACE_S)
                    log.down[-1] = (begin, log.now())
                    return None
            await asyncio.sleep(0.2)
    return f"no engine was ready within {READY_WITHIN_S:g} s"


async def cut_client(server: Server, log: Log) -> str | None:
    """A client that resets its connection in the middle of a stream: its request is given up."""
    raw = await asyncio.to_thread(_begin, server, 65536)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    return None  # that nothing stays behind is seen in the books at the end


async def slow_reader(server: Server, log: Log) -> str | None:
    """A reader that takes nothing for a while. It holds up nobody: the front goes on answering."""
    raw = await asyncio.to_thread(_begin, server, 2048)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            for _ in range(5):
                answer = await http.get("/health/live")
                if answer.status_code != 200:
                    return f"/health/live gave {answer.status_code}"
                await asyncio.sleep(1)
    finally:
        raw.close()
    return None


async def bad_upload(server: Server, log: Log) -> str | None:
    """Weights that are none: refused with a reason, and not listed afterwards."""
    files = {"config": b'{"peft_type": "LORA", "r": 8}', "weights": b"\xff" * 4096}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        begin = log.now()
        answer = await http.post(
            "/v1/adapters", data={"name": "broken"}, files=files, params={"wait": 60}
        )
        if answer.status_code == 503 and log.is_explained(begin, log.now()):
            return None
        if not 400 <= answer.status_code < 500:
            return f"broken weights gave {answer.status_code} {answer.text[:200]}"
        error = answer.json().get("error") or {}
        if not error.get("message"):
            return f"no reason: {answer.text[:200]}"
        gone = await http.delete("/v1/adapters/broken")
        is_gone = gone.is_success or gone.status_code == 404
        return None if is_gone else f"delete: {gone.status_code}"


def _begin(server: Server, buffer: int) -> socket.socket:
    """A stream of which the first bytes have come."""
    body = msgspec.json.encode(LONG)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.settimeout(120)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
    raw.recv(1)
    return raw


FAULTS: dict[str, Callable[[Server, Log], Awaitable[str | None]]] = {
    "client cut": cut_client,
    "bad upload": bad_upload,
    "engine killed": kill_engine,
    "slow reader": slow_reader,
}
