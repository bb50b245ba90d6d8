"""The front's own CPU time per streamed token, with an engine that computes nothing.

    python loadtests/serving/front_overhead.py [--streams 1,8,32] [--out docs/results/x.json]

The front, its HTTP server and its detokenizer run in a process of their own; the engine is the
scripted one of the tests, one token a request and a step of about 20 ms; the client reads raw
sockets in this process. The figure is the front process's CPU time from the first byte sent to the
last event read, over the tokens streamed: parsing, admission and metrics included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import throughput

ROOT = Path(__file__).parents[2]
STEP_S = 0.02
TOKENS = 400


def serve_front(folder: str, port: int) -> None:
    """A front over scripted processes; runs until it is killed."""
    os.environ["PYTHONPATH"] = f"{ROOT / 'server'}:{ROOT / 'kernels'}"
    import uvicorn
    import uvloop
    from tests.front.house import ENGINE, INGEST

    from loramux.config import DEMO_DIR, ServerConfig
    from loramux.front.front import Front
    from loramux.http.app import build_app
    from loramux.http.connection import uvicorn_config

    config = ServerConfig(model=DEMO_DIR / "base", data_dir=Path(folder), port=port)
    app = build_app(Front(config, engine=ENGINE, ingest=INGEST), config)
    server = uvicorn.Server(uvicorn_config(app, config, port=port))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve())


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a pid


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready")
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the front did not become ready")


async def stream(port: int, delay_s: float, seed: int) -> int:
    """One streamed completion; how many events carried text."""
    body = json.dumps(
        {
            "model": "demo",
            "prompt": [40 + (seed + i) % 50 for i in range(64)],
            "max_tokens": TOKENS,
            "stream": True,
            "cache_salt": f"delay={delay_s}",
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n")
    writer.write(body)
    events = 0
    async for line in reader:
        events += line.startswith(b"data: {")
    writer.close()
    return events


async def all_streams(port: int, streams: int) -> list[int]:
    # The scripted engine sleeps for each row by itself: one row sleeps for the whole batch.
    delays = [STEP_S] + [0.0] * (streams - 1)
    return await asyncio.gather(*(stream(port, delay, n) for n, delay in enumerate(delays)))


def measure(pid: int, port: int, streams: int, repeats: int) -> dict[str, Any]:
    asyncio.run(all_streams(port, streams))
    costs, steps_s = [], []
    for _ in range(repeats):
        before, began = cpu_seconds(pid), time.monotonic()
        events = asyncio.run(all_streams(port, streams))
        assert min(events) >= 0.95 * TOKENS, (
            events
        )  # else tokens were merged: cheaper, and not meant
        costs.append(1e6 * (cpu_seconds(pid) - before) / (streams * TOKENS))
        steps_s.append((time.monotonic() - began) / TOKENS)
    return {
        "streams": streams,
        "cpu_us_per_token": round(statistics.median(costs), 1),
        "runs": [round(cost, 1) for cost in costs],
        "step_ms": round(1e3 * statistics.median(steps_s), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = throughput.header()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        front = context.Process(target=serve_front, args=(folder, args.port))
        front.start()
        try:
            wait_until_ready(args.port)
            assert front.pid is not None
            for streams in map(int, args.streams.split(",")):
                report["cases"].append(measure(front.pid, args.port, streams, args.repeats))
                print(json.dumps(report["cases"][-1]), file=sys.stderr)
        finally:
            front.terminate()
            front.join()
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
