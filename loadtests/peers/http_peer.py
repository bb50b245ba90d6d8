"""A peer that is a server: started on a free port, asked over HTTP by one asynchronous client."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from cases import Job
from peer import TIE_FP32, Models, Process, Run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A base of the server peers. Answers come whole, not streamed: no client counts pieces."""

    against = "loramux-http"
    tie = TIE_FP32
    health = "/health"
    path = "/v1/completions"

    def __init__(self, name: str, program: Path) -> None:
        self.name = name
        self._program = program
        self._url = ""
        self._process: Process

    def missing(self) -> str | None:
        return None if self._program.exists() else f"no {self._program}"

    def command(self, models: Models, port: int) -> list[str | Path]:
        """How it is started."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def body(self, job: Job) -> dict[str, Any]:
        """What it is asked; here as vLLM and loramux read it."""
        return {
            "model": "base" if job.adapter < 0 else f"a{job.adapter}",
            "prompt": job.prompt,
            "max_tokens": job.num_new,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def tokens(self, answer: dict[str, Any]) -> list[int]:
        """The new token ids in an answer."""
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def start(self, models: Models) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        log = models.folder / "logs" / f"{self.name}.log"
        self._process = Process(self.command(models, port), log, env=self.environment())
        self._process.wait_until(self._ready)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + self.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def run(self, jobs: Sequence[Job], concurrency: int) -> Run:
        try:
            return asyncio.run(self._run(jobs, concurrency))
        except httpx.TransportError as error:
            raise RuntimeError(f"{self.name}: {error!r}\n{self._process.tail()}") from error

    async def _run(self, jobs: Sequence[Job], concurrency: int) -> Run:
        places = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as client:

            async def ask(job: Job) -> list[int]:
                async with places:
                    answer = await client.post(self.path, json=self.body(job))
                if answer.status_code != 200:
                    raise RuntimeError(f"{self.name}: {answer.status_code} {answer.text[:500]}")
                return self.tokens(answer.json())

            start = time.perf_counter()
            outputs = await asyncio.gather(*(ask(job) for job in jobs))
            return Run(time.perf_counter() - start, list(outputs))

    def idle_cpu(self) -> float:
        return self._process.idle_cpu()

    def stop(self) -> None:
        self._process.stop()
