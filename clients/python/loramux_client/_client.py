"""The two ways to carry out a flow: ``Client`` blocks, ``AsyncClient`` awaits (asyncio)."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, cast

import httpx

from loramux_client import _verbs
from loramux_client._errors import (
    ConnectionFailedError,
    IncompleteResponseError,
    LoramuxClientError,
    RequestTimeoutError,
)
from loramux_client._models import Chunk
from loramux_client._protocol import (
    Answer,
    Flow,
    Sleep,
    Step,
    StreamDecoder,
    identity,
    retrying,
)

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., object])

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Ten minutes without a byte: a long answer that is not streamed is silent until it is whole."""


class _Runs(Protocol):
    def _run(self, flow: Flow[T], /) -> T: ...


class _RunsAsync(Protocol):
    async def _run(self, flow: Flow[T], /) -> T: ...


def _blocking(verb: Callable[P, Flow[T]]) -> Callable[Concatenate[Any, P], T]:
    """A verb as a method of a blocking client."""

    def method(self: _Runs, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(verb(*args, **kwargs))

    return _like(verb, method)


def _awaited(verb: Callable[P, Flow[T]]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """A verb as a method of an asyncio client."""

    async def method(self: _RunsAsync, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(verb(*args, **kwargs))

    return _like(verb, method)


def _streamed(
    verb: Callable[P, Flow[Answer]], as_stream: Callable[[Any, Flow[Answer]], S]
) -> Callable[Concatenate[Any, P], S]:
    """A verb as a method that gives a stream, which starts when it is entered or iterated."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> S:
        return as_stream(self, verb(*args, **kwargs))

    return _like(verb, method)


def _like(verb: Callable[..., object], method: M) -> M:
    """``method`` with the verb's name, docstring and signature, to which it only adds ``self``."""
    functools.update_wrapper(method, verb)
    signature = inspect.signature(verb)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = signature.replace(parameters=[itself, *signature.parameters.values()])
    vars(method)["__signature__"] = signature
    return method


class Stream:
    """The chunks of one answer as they come; ``with`` it, so that leaving early stops the server.

    Raises the server's error if it gives up, IncompleteResponseError if the stream is cut off.
    ``request_id``, ``adapter_digest`` and ``adapter_version`` are known once it is entered.
    """

    request_id: str | None = None
    adapter_digest: str | None = None
    adapter_version: str | None = None

    def __init__(self, client: Client, flow: Flow[Answer]) -> None:
        self._client = client
        self._flow = flow
        self._response: httpx.Response | None = None
        self._chunks = self._decoded()

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stop. The server aborts what it has not generated yet."""
        self._chunks.close()
        if self._response is not None:
            self._response.close()

    def _start(self) -> httpx.Response:
        if self._response is None:
            answer = self._client._run(self._flow)
            self.request_id, self.adapter_digest, self.adapter_version = identity(answer)
            self._response = cast(httpx.Response, answer.live)
        return self._response

    def _decoded(self) -> Generator[Chunk]:
        response = self._start()
        decoder = StreamDecoder(self.request_id)
        try:
            # Read on after [DONE]: a connection read to its end can be used again.
            for data in response.iter_bytes():
                yield from decoder.feed(data)
        except httpx.RequestError as exc:
            if not decoder.done:
                raise _cut_off(exc) from exc
        finally:
            response.close()
        decoder.end()


class AsyncStream:
    """``Stream`` for asyncio: ``async with`` and ``async for``."""

    request_id: str | None = None
    adapter_digest: str | None = None
    adapter_version: str | None = None

    def __init__(self, client: AsyncClient, flow: Flow[Answer]) -> None:
        self._client = client
        self._flow = flow
        self._response: httpx.Response | None = None
        self._chunks = self._decoded()

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def close(self) -> None:
        """Stop. The server aborts what it has not generated yet."""
        await self._chunks.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def _start(self) -> httpx.Response:
        if self._response is None:
            answer = await self._client._run(self._flow)
            self.request_id, self.adapter_digest, self.adapter_version = identity(answer)
            self._response = cast(httpx.Response, answer.live)
        return self._response

    async def _decoded(self) -> AsyncGenerator[Chunk]:
        response = await self._start()
        decoder = StreamDecoder(self.request_id)
        try:
            async for data in response.aiter_bytes():
                for chunk in decoder.feed(data):
                    yield chunk
        except httpx.RequestError as exc:
            if not decoder.done:
                raise _cut_off(exc) from exc
        finally:
            await response.aclose()
        decoder.end()


class Adapters:
    """The adapters of a server: ``client.adapters``."""

    def __init__(self, client: Client) -> None:
        self._run = client._run

    push = _blocking(_verbs.push)
    blend = _blocking(_verbs.blend)
    list = _blocking(_verbs.list_adapters)
    show = _blocking(_verbs.show)
    delete = _blocking(_verbs.delete)
    pin = _blocking(_verbs.pin)
    unpin = _blocking(_verbs.unpin)
    versions = _blocking(_verbs.versions)
    set_ttl = _blocking(_verbs.set_ttl)


class Aliases:
    """Names that stand for adapters: ``client.aliases``."""

    def __init__(self, client: Client) -> None:
        self._run = client._run

    set = _blocking(_verbs.set_alias)
    list = _blocking(_verbs.list_aliases)
    show = _blocking(_verbs.show_alias)
    delete = _blocking(_verbs.delete_alias)


class AsyncAdapters:
    """The adapters of a server: ``client.adapters``."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client._run

    push = _awaited(_verbs.push)
    blend = _awaited(_verbs.blend)
    list = _awaited(_verbs.list_adapters)
    show = _awaited(_verbs.show)
    delete = _awaited(_verbs.delete)
    pin = _awaited(_verbs.pin)
    unpin = _awaited(_verbs.unpin)
    versions = _awaited(_verbs.versions)
    set_ttl = _awaited(_verbs.set_ttl)


class AsyncAliases:
    """Names that stand for adapters: ``client.aliases``."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client._run

    set = _awaited(_verbs.set_alias)
    list = _awaited(_verbs.list_aliases)
    show = _awaited(_verbs.show_alias)
    delete = _awaited(_verbs.delete_alias)


class Client:
    """A loramux server at ``base_url`` (``http://host:port``, with or without ``/v1``).

    ``timeout``: seconds without a byte, or an httpx.Timeout. ``max_retries``: how often a request
    is tried again where that can help. ``transport``: httpx's, for proxies and tests.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._max_retries = max_retries
        self._http = httpx.Client(
            **_settings(base_url, api_key, timeout, max_retries), transport=transport
        )
        self.adapters = Adapters(self)
        self.aliases = Aliases(self)

    complete = _blocking(_verbs.complete)
    chat = _blocking(_verbs.chat)
    stream = _streamed(_verbs.stream, Stream)
    models = _blocking(_verbs.models)
    health = _blocking(_verbs.health)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        flow = retrying(flow, self._max_retries)
        try:
            step = next(flow)
            while True:
                try:
                    result = self._perform(step)
                except BaseException as exc:
                    step = flow.throw(exc)
                else:
                    step = flow.send(result)
        except StopIteration as stop:
            return cast(T, stop.value)

    def _perform(self, step: Step) -> Answer | None:
        if isinstance(step, Sleep):
            time.sleep(step.seconds)
            return None
        request = self._http.build_request(
            step.method, step.path, headers=dict(step.headers), content=step.body
        )
        try:
            response = self._http.send(request, stream=True)
        except httpx.RequestError as exc:
            raise _no_answer(exc) from exc
        if step.stream and response.is_success:
            return Answer(response.status_code, response.headers, live=response)
        try:
            return Answer(response.status_code, response.headers, response.read())
        except httpx.RequestError as exc:
            raise _cut_off(exc) from exc
        finally:
            response.close()


class AsyncClient:
    """``Client`` for asyncio: the same verbs, awaited.

    Files to push are read in small blocks on the event loop. To compress an adapter or to save one
    from memory takes it as long as it takes: call ``compress`` in a thread.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._max_retries = max_retries
        self._http = httpx.AsyncClient(
            **_settings(base_url, api_key, timeout, max_retries), transport=transport
        )
        self.adapters = AsyncAdapters(self)
        self.aliases = AsyncAliases(self)

    complete = _awaited(_verbs.complete)
    chat = _awaited(_verbs.chat)
    stream = _streamed(_verbs.stream, AsyncStream)
    models = _awaited(_verbs.models)
    health = _awaited(_verbs.health)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        flow = retrying(flow, self._max_retries)
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._perform(step)
                except BaseException as exc:
                    step = flow.throw(exc)
                else:
                    step = flow.send(result)
        except StopIteration as stop:
            return cast(T, stop.value)

    async def _perform(self, step: Step) -> Answer | None:
        if isinstance(step, Sleep):
            await asyncio.sleep(step.seconds)
            return None
        body = step.body if isinstance(step.body, bytes) else _async(step.body)
        request = self._http.build_request(
            step.method, step.path, headers=dict(step.headers), content=body
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx.RequestError as exc:
            raise _no_answer(exc) from exc
        if step.stream and response.is_success:
            return Answer(response.status_code, response.headers, live=response)
        try:
            return Answer(response.status_code, response.headers, await response.aread())
        except httpx.RequestError as exc:
            raise _cut_off(exc) from exc
        finally:
            await response.aclose()


async def _async(blocks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block


def _settings(
    base_url: str, api_key: str | None, timeout: float | httpx.Timeout, max_retries: int
) -> dict[str, Any]:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url {base_url!r} does not start with http:// or https://")
    if max_retries < 0:
        raise ValueError("max_retries is negative")
    headers = {"user-agent": "loramux-client"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    root = base_url.rstrip("/").removesuffix("/v1")
    return {"base_url": root, "headers": headers, "timeout": timeout}


def _no_answer(exc: httpx.RequestError) -> LoramuxClientError:
    what = f"{type(exc).__name__}: {exc}".removesuffix(": ")
    # A connection that takes too long to open has not sent anything yet: like one that is refused.
    if isinstance(exc, httpx.TimeoutException) and not isinstance(exc, httpx.ConnectTimeout):
        return RequestTimeoutError(f"no answer from the server in time ({what})")
    return ConnectionFailedError(f"no answer from the server ({what})")


def _cut_off(exc: httpx.RequestError) -> IncompleteResponseError:
    what = f"{type(exc).__name__}: {exc}".removesuffix(": ")
    return IncompleteResponseError(f"the answer was cut off ({what})")
