"""What a plan is sent to: a server with OpenAI's API, the engine in this process, a batch peer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from connections import Connections, NoAnswer
from open_loop import Failure, Now, Record

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


class Steps(Protocol):
    """An engine that is stepped: ``workload.Served`` is one."""

    def submit(self, prompt: list[int], num_new: int, digest: str) -> str: ...

    def step(self) -> Any: ...

    def drop(self, unfinished: set[str]) -> None: ...


class InProcess:
    """An engine in this process, stepped by a thread for as long as there is work."""

    def __init__(
        self, served: Steps, digests: Sequence[str], prompt: Callable[[int, int], list[int]]
    ) -> None:
        self._served, self._digests, self._prompt = served, digests, prompt
        self._asked: list[tuple[int, Record, asyncio.Future[None], Now]] = []
        self._work = threading.Condition()
        self._stop = False
        self._loop = asyncio.get_running_loop()
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def ask(self, index: int, record: Record, now: Now) -> None:
        if self.failed is not None:
            raise self.failed
        end: asyncio.Future[None] = self._loop.create_future()
        with self._work:
            self._asked.append((index, record, end, now))
            self._work.notify()
        await end

    def _run(self) -> None:
        running: dict[str, tuple[Record, asyncio.Future[None], Now]] = {}
        try:
            while True:
                with self._work:
                    while not (self._asked or running or self._stop):
                        self._work.wait()
                    if self._stop:
                        self._served.drop(set(running))
                        return
                    asked, self._asked = self._asked, []
                for index, record, end, now in asked:
                    arrival = record.arrival
                    ids = self._prompt(index, arrival.prompt_tokens)
                    digest = self._digests[arrival.adapter]
                    running[self._served.submit(ids, arrival.output_tokens, digest)] = (
                        record,
                        end,
                        now,
                    )
                self._commit(running)
        except BaseException as error:  # told to whoever asks or waits
            self.failed = error
            for _, end, _ in running.values():
                self._loop.call_soon_threadsafe(_fail, end, error)

    def _commit(self, running: dict[str, tuple[Record, asyncio.Future[None], Now]]) -> None:
        done = self._served.step()
        for output in done.outputs:
            record, _, now = running[output.request_id]
            record.chunks_s.append(now())
            record.completion_tokens += len(output.token_ids)
        for finished in done.finished:
            record, end, now = running.pop(finished.request_id)
            self._loop.call_soon_threadsafe(_end, end, record, now(), record.completion_tokens)

    async def close(self) -> None:
        with self._work:
            self._stop = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join)


def _end(future: asyncio.Future[None], record: Record, now_s: float, num_tokens: int) -> None:
    if not future.done():  # else the run was over before
        record.finish(now_s, record.arrival.prompt_tokens, num_tokens)
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


class Batches:
    """A peer that takes a batch and returns it whole, as ``generate()`` does: what waits when a
    batch ends makes the next one. Nothing is streamed, so the first token comes with the last."""

    def __init__(
        self,
        generate: Callable[[list[tuple[int, Record]]], list[list[int]]],
        most: int,
    ) -> None:
        self._generate, self._most = generate, most
        self._waiting: list[tuple[int, Record, asyncio.Future[None], Now]] = []
        self._ready = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def ask(self, index: int, record: Record, now: Now) -> None:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((index, record, end, now))
        self._ready.set()
        await end

    async def _run(self) -> None:
        while True:
            await self._ready.wait()
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            try:
                outputs = await asyncio.to_thread(
                    self._generate, [(index, record) for index, record, *_ in batch]
                )
            except Exception as error:
                for *_, end, _ in batch + self._waiting:
                    _fail(end, error)
                raise
            for (_, record, end, now), ids in zip(batch, outputs, strict=True):
                _end(end, record, now(), len(ids))
            if not self._waiting:
                self._ready.clear()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
