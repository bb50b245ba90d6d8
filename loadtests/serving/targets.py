"""What a plan is sent to beside a server: the engine in this process, a batch peer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from loramux.bench.open_loop import Now, Record


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
