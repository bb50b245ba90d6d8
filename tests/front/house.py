"""A front with scripted processes, and how tests talk to it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.front.model_dir import write_model

from loramux.config import ServerConfig
from loramux.front.front import Front
from loramux.front.generation import Delta, Generation, GenerationSpec
from loramux.request import Adapters, SamplingParams

HERE = Path(__file__).parent
SERVER = HERE.parents[1] / "server"
ENGINE = (sys.executable, str(HERE / "fake_engine.py"))
INGEST = (sys.executable, str(HERE / "fake_ingest.py"))
PARTNERS = ("draft_model", "small_model")
PROMPT = [40, 41, 42, 43, 44]


def configure(folder: Path, **fields: Any) -> ServerConfig:
    """A configuration with short times; the model directories are made when missing."""
    for name in ("model", *(fields[key].name for key in PARTNERS if fields.get(key))):
        if not (folder / name).exists():
            write_model(folder / name)
    model = folder / "model"
    values: dict[str, Any] = {
        "model": model,
        "served_model_name": "base",
        "data_dir": folder / "data",
        "heartbeat_s": 0.05,
        "heartbeat_timeout_s": 20,
        "drain_s": 5,
    }
    return ServerConfig(**{**values, **fields})


@asynccontextmanager
async def running(
    config: ServerConfig, *, ready: bool = True, **commands: Any
) -> AsyncIterator[Front]:
    """A started front, stopped in the end."""
    front = Front(config, **{"engine": ENGINE, "ingest": INGEST, **commands})
    await front.start()
    try:
        if ready:
            await until(lambda: front.not_ready() == [])
        yield front
    finally:
        await front.stop()


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something to become true; the time is only for machines that crawl."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.01)


def spec(
    request_id: str = "r",
    script: str = "",
    max_tokens: int = 8,
    adapters: Adapters = (),
    prompt_ids: list[int] | None = None,
    **fields: Any,
) -> GenerationSpec:
    """One choice that the fake engine plays by ``script``."""
    return GenerationSpec(
        request_id=request_id,
        adapters=adapters,
        prompt_ids=PROMPT if prompt_ids is None else prompt_ids,
        sampling=SamplingParams(seed=1, max_tokens=max_tokens),
        cache_salt=script,
        **fields,
    )


async def collect(generation: Generation) -> Delta:
    """Everything a generation gives, merged."""
    whole = Delta()
    async for delta in generation:
        whole.extend(delta)
    return whole


def expected(num: int) -> list[int]:
    """The tokens the fake engine answers PROMPT with."""
    return [PROMPT[i % len(PROMPT)] for i in range(num)]
