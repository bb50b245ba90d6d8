"""SIGTERM with fifty streams of a real model. What else may happen then: tests/http/test_drain."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import httpx
from tests import tiny
from tests.e2e.server import Server

STREAMS = 50
NUM = 120


def test_fifty_streams_outlive_sigterm(tmp_path: Path) -> None:
    server = Server(tiny.write_model(tmp_path / "tiny", "llama"), tmp_path / "data")
    begun = Barrier(STREAMS + 1)

    def stream(number: int) -> list[str]:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": NUM, "seed": number}
        with (
            httpx.Client(base_url=server.url, timeout=100) as http,
            http.stream(
                "POST", "/v1/completions", json={**body, "ignore_eos": True, "stream": True}
            ) as answer,
        ):
            lines = answer.iter_lines()
            first = next(lines)
            begun.wait()
            return [first, *lines]

    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, number) for number in range(STREAMS)]
        begun.wait()
        server.process.send_signal(signal.SIGTERM)
        while not (probe := server.http.get("/health/ready")).json()["reasons"]:
            pass
        assert probe.status_code == 503 and probe.json()["reasons"] == ["draining"]
        refused = server.complete("tiny", "x")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        for each in streams:
            lines = [line for line in each.result() if line]
            assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
    assert server.process.wait(60) == 0
    server.close()
