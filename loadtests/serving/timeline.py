"""What a server says of itself while it is loaded: its pool, its queue, which adapters are there.

Read from ``/metrics`` once in ``EVERY_S``; a server without loramux's or vLLM's names there has no
timeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

EVERY_S = 1.0
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "loramux_resident_adapters": "resident",
    "loramux_loading_adapters": "loading_adapters",
    "loramux_pool_frames_total": "frames",
}


def sample(text: str) -> dict[str, float]:
    """The series of one scrape that a timeline keeps; frames by owner as ``pool_<owner>``."""
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == "loramux_pool_frames":
                found[f"pool_{one.labels['owner']}"] += one.value
            elif one.name in GAUGES:
                found[GAUGES[one.name]] += one.value
    return dict(found)


class Timeline:
    """``async with Timeline(url) as timeline``: ``points`` grow until the end."""

    def __init__(self, url: str, key: str = "") -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, timeout=10, headers=headers)
        self._task: asyncio.Task[None]
        self.points: list[dict[str, Any]] = []

    async def __aenter__(self) -> Timeline:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._http.aclose()

    async def _watch(self) -> None:
        start = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                answer = await self._http.get("/metrics")
                found = sample(answer.text) if answer.status_code == 200 else {}
                if found:
                    self.points.append({"at_s": round(time.monotonic() - start, 2), **found})
            await asyncio.sleep(EVERY_S)
