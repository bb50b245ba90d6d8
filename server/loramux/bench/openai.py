"""A server with OpenAI's API as what a plan is sent to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from loramux.bench.connections import Connections, NoAnswer
from loramux.bench.open_loop import Failure, Now, Record

Prompt = str | list[int]


class OpenAi:
    """A server's ``/v1/completions``, streamed; ``models[k]`` is the name of adapter ``k``.

    ``keys``: an API key for each tenant. ``extra`` goes into every request (``ignore_eos``).
    """

    def __init__(
        self,
        url: str,
        base: str,
        models: Sequence[str],
        prompt: Callable[[int, int], Prompt],
        *,
        keys: Sequence[str] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._base, self._models, self._prompt, self._keys = base, models, prompt, keys
        self._extra = extra or {}
        self._connections = Connections(url)

    def body(self, index: int, record: Record) -> dict[str, Any]:
        """What is asked."""
        arrival = record.arrival
        return {
            "model": self._base if arrival.adapter < 0 else self._models[arrival.adapter],
            "prompt": self._prompt(index, arrival.prompt_tokens),
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }

    async def ask(self, index: int, record: Record, now: Now) -> None:
        headers = {"content-type": "application/json"}
        if self._keys:
            key = self._keys[record.arrival.tenant % len(self._keys)]
            headers["authorization"] = f"Bearer {key}"
        body = msgspec.json.encode(self.body(index, record))
        answer = _Answer(record, now)
        try:
            status = await self._connections.post("/v1/completions", body, headers, answer.read)
        except NoAnswer as error:
            raise Failure(str(error)) from error
        answer.end(status)

    async def close(self) -> None:
        self._connections.close()


class _Answer:
    """What has been read of a streamed answer, or of a refusal."""

    def __init__(self, record: Record, now: Now) -> None:
        self._record, self._now = record, now
        self._rest = b""
        self._usage: dict[str, Any] | None = None
        self._done_s: float | None = None

    def read(self, status: int, piece: bytes) -> None:
        """The next piece of the body. Raises Failure for an error in the stream."""
        self._rest += piece
        if status != 200:
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip())

    def _read_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._done_s = self._now()
            return
        event = msgspec.json.decode(data)
        if "error" in event:
            raise Failure(f"stream {event['error'].get('code')}")
        if any(choice.get("text") for choice in event["choices"]):
            self._record.chunks_s.append(self._now())
        self._usage = event.get("usage") or self._usage

    def end(self, status: int) -> None:
        """Nothing more comes. Raises Failure unless it was a whole answer with its usage."""
        if status != 200:
            raise Failure(f"{status} {_code(self._rest)}")
        if self._done_s is None:
            raise Failure("stream ended early")
        if self._usage is None:
            raise Failure("no usage")
        usage = self._usage
        self._record.finish(self._done_s, usage["prompt_tokens"], usage["completion_tokens"])


def _code(body: bytes) -> str:
    """What an error calls itself."""
    with contextlib.suppress(msgspec.DecodeError, AttributeError, KeyError, TypeError):
        error = msgspec.json.decode(body)["error"]
        return str(error.get("code") or error.get("type"))
    return "error"
