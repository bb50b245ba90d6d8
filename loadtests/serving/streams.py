"""A server in a process of its own, and streams sent to it at times that do not depend on it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROMPT = "One sunny morning Mira the baker left Oldport with seven apples."


@dataclass
class Answer:
    """What became of one request; times in seconds since it was to be sent."""

    key: int
    sent: float
    status: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    tokens: int = 0
    whole: bool = False


class Server:
    """``loramux serve`` on the demo model; ready when the constructor returns."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        paths = os.pathsep.join(str(ROOT / top) for top in ("server", "kernels"))
        command = [sys.executable, "-m", "loramux.cli", "serve", "--data-dir", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--log-level", "warning", *flags],
            env={**os.environ, "PYTHONPATH": paths},
        )
        deadline = time.monotonic() + 300
        while not self._ready():
            assert self.process.poll() is None and time.monotonic() < deadline, "it did not start"
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            self.get("/health/ready")
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """The sum over the series of a metric."""
        lines = (line for line in self.get("/metrics").splitlines() if line.startswith(name))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def ask(server: Server, key: int, began: float, max_tokens: int) -> Answer:
    """One streamed completion by an adapter list of its own: the demo's ``pirate`` at a scale."""
    answer = Answer(key, time.monotonic() - began)
    start = time.monotonic()
    wears = [{"id": "pirate", "scale": 1 + key / 1000}]
    body = json.dumps(
        {
            "model": "demo",
            "adapters": wears,
            "prompt": f"{answer.sent:.4f} {PROMPT}",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    host = f"127.0.0.1:{server.port}"
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n")
    writer.write(body)
    answer.status = int((await reader.readline()).split()[1])
    assert answer.status in (200, 503), f"the server answers {answer.status}"
    async for line in reader:
        if line.startswith(b"data: {"):
            answer.first_s = answer.first_s or time.monotonic() - start
            assert b'"error"' not in line, line
        answer.whole |= line.startswith(b"data: [DONE]")
    answer.end_s = time.monotonic() - start
    answer.tokens = max_tokens if answer.whole else 0
    writer.close()
    return answer


@dataclass
class Load:
    """Poisson arrivals: ``rates[key]`` requests a second, for ``seconds``."""

    rates: dict[int, float]
    seconds: float
    max_tokens: int
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)

    async def run(self, server: Server) -> list[Answer]:
        """Every answer, in the order of their beginnings."""
        draw = random.Random(self.seed)
        times = []
        for key, rate in self.rates.items():
            at = draw.expovariate(rate)
            while at < self.seconds:
                times.append((at, key))
                at += draw.expovariate(rate)
        began = time.monotonic()
        tasks = []
        for at, key in sorted(times):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            tasks.append(asyncio.create_task(ask(server, key, began, self.max_tokens)))
        return await asyncio.gather(*tasks)


async def closed_loop(server: Server, num: int, seconds: float, max_tokens: int) -> float:
    """Tokens a second with ``num`` requests in flight all the time."""
    began = time.monotonic()

    async def one(key: int) -> int:
        tokens = 0
        while time.monotonic() - began < seconds:
            answer = await ask(server, key, began, max_tokens)
            tokens += answer.tokens
        return tokens

    made = await asyncio.gather(*(one(key) for key in range(num)))
    return sum(made) / (time.monotonic() - began)


def percentile(values: list[float], percent: int) -> float:
    """The nearest that the values say; nan of none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def first_tokens(answers: list[Answer]) -> list[float]:
    """Seconds to the first token, of those that were let in."""
    return [answer.first_s for answer in answers if answer.status == 200]


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Of one load: what was let in, what was refused, and how long both took, in milliseconds."""
    firsts = first_tokens(answers)
    refused = [answer.end_s for answer in answers if answer.status == 503]
    return {
        "requests": len(answers),
        "let_in": len(firsts),
        "finished": sum(answer.whole for answer in answers),
        "refused": len(refused),
        "other": sum(answer.status not in (200, 503) for answer in answers),
        "first_p50_ms": 1e3 * percentile(firsts, 50),
        "first_p95_ms": 1e3 * percentile(firsts, 95),
        "refusal_p50_ms": 1e3 * percentile(refused, 50) if len(refused) > 1 else None,
        "refusal_p99_ms": 1e3 * percentile(refused, 99) if len(refused) > 1 else None,
    }
