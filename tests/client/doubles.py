"""One suite for both clients: a blocking face for either, and an adapter folder to push."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any, Literal

from loramux_client import AsyncClient, Client

Kind = Literal["sync", "async"]


class Both:
    """``Client`` or ``AsyncClient`` with the same blocking face."""

    def __init__(self, kind: Kind, base_url: str = "http://test", **options: Any) -> None:
        self.runner = asyncio.Runner() if kind == "async" else None
        make: Any = AsyncClient if kind == "async" else Client
        self.client = make(base_url, **options)

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """``call("adapters.show", name)`` is ``client.adapters.show(name)``, awaited if need be."""
        target = self.client
        for part in verb.split("."):
            target = getattr(target, part)
        return self.wait(target(*args, **kwargs))

    def open(self, *args: Any, **kwargs: Any) -> OpenStream:
        """Enter ``client.stream(...)``."""
        stream = self.client.stream(*args, **kwargs)
        self.wait(stream.__aenter__() if self.runner else stream.__enter__())
        return OpenStream(self, stream)

    def chunks(self, *args: Any, **kwargs: Any) -> list[Any]:
        """All chunks of a stream that nobody enters."""
        stream = self.client.stream(*args, **kwargs)
        return OpenStream(self, stream).rest()

    def wait(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            assert self.runner is not None

            async def awaited() -> Any:
                return await value

            return self.runner.run(awaited())
        return value

    def close(self) -> None:
        self.wait(self.client.close())
        if self.runner:
            self.runner.close()


class OpenStream:
    """A stream of either kind, read by hand."""

    def __init__(self, both: Both, stream: Any) -> None:
        self.both = both
        self.stream = stream

    def next(self) -> Any:
        both = self.both
        return both.wait(anext(self.stream)) if both.runner else next(self.stream)

    def rest(self) -> list[Any]:
        chunks = []
        while True:
            try:
                chunks.append(self.next())
            except (StopIteration, StopAsyncIteration):
                return chunks

    def close(self) -> None:
        self.both.wait(self.stream.close())


def write_adapter_files(directory: Path, weights: bytes = b"weights" * 1000) -> Path:
    """What the client looks for; it never looks into it."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory
