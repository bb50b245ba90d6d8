"""A server with OpenAI's API as what a plan is sent to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from loramux.bench.open_loop import Failure, Now, Record

Prompt = str | list[int]

KEEP_S = 2.0
"""How long a connection may lie idle. A server that closes idle ones later takes no request with
it, and no POST is sent twice."""


class OpenAi:
    """A server's ``/v1/completions``, streamed; ``models[k]`` is the name of adapter ``k``.

    ``keys``: an API key for each tenant. ``extra`` goes into every request (``ignore_eos``).
    Raises ValueError for what is no HTTP address. A client that shares its cores with the server
    measures itself if it is slow: aiohttp takes a fifth of httpx' time.
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
        self._where = _address(url) / "v1" / "completions"
        self._session: aiohttp.ClientSession | None = None

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
        if self._session is None:
            self._session = _session()
        try:
            async with self._session.post(
                self._where, data=body, headers=headers, allow_redirects=False
            ) as response:
                with contextlib.suppress(aiohttp.ClientPayloadError):  # then it is not whole
                    async for piece in response.content.iter_any():
                        answer.read(response.status, piece)
                answer.end(response.status)
        except aiohttp.ClientConnectorError as error:
            raise Failure(type(error.os_error).__name__) from error
        except aiohttp.ClientError as error:
            raise Failure(type(error).__name__) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _address(url: str) -> URL:
    address = URL(url)
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{url!r} is not http://HOST[:PORT] or https://HOST[:PORT]")
    return address


def _session() -> aiohttp.ClientSession:
    """As many connections as there are requests at once, and nothing that is not asked for."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),
        headers={"accept-encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


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
