"""The conversation with the server without a socket: requests, retries, answers, event streams.

A *flow* is a generator that yields what it wants done (send a ``Request``, ``Sleep``) and is sent
the ``Answer``; it returns a result or raises. Clients only carry out the steps, so every decision
is here once, for blocking and asyncio code alike, and can be tested without either.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loramux_client._errors import (
    APIError,
    ConnectionFailedError,
    IncompleteResponseError,
    InvalidResponseError,
    api_error,
)
from loramux_client._models import Chunk

T = TypeVar("T")

RETRY_STATUS = frozenset({408, 409, 429})
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 8.0
LONGEST_RETRY_AFTER_S = 60.0
"""A server that asks for a longer pause gets none: the caller decides, with ``retry_after_s``."""


@dataclass(frozen=True)
class Request:
    """One HTTP request. ``body`` may be iterated again for a second try; ``headers`` then say how
    long it is. ``accept`` are statuses beyond 2xx that are answers, not errors. ``stream``: the
    answer's body is left unread."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""
    stream: bool = False
    retry: bool = True
    accept: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sleep:
    """Wait this long."""

    seconds: float


@dataclass(frozen=True)
class Answer:
    """A whole answer, or its beginning: then ``live`` is the client's own, open response."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    live: Any = None

    def json(self) -> dict[str, Any]:
        """The body, which has to be a JSON object."""
        try:
            value = json.loads(self.body)
        except ValueError as exc:
            raise InvalidResponseError(f"the answer ({self.status}) is not JSON") from exc
        if not isinstance(value, dict):
            raise InvalidResponseError(f"the answer ({self.status}) is not a JSON object")
        return value


Step = Request | Sleep
Flow = Generator[Step, Any, T]


def json_request(method: str, path: str, value: Mapping[str, Any], **options: Any) -> Request:
    """A request with a JSON body. Raises ValueError for NaN and infinities, which JSON lacks."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return Request(method, path, headers={"content-type": "application/json"}, body=body, **options)


def retrying(flow: Flow[T], max_retries: int) -> Flow[T]:
    """The same flow with every request tried again where that can help."""
    try:
        step = next(flow)
        while True:
            try:
                result = yield from _attempts(step, max_retries)
            except BaseException as exc:
                step = flow.throw(exc)
            else:
                step = flow.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


def _attempts(step: Step, max_retries: int) -> Flow[Answer | None]:
    if isinstance(step, Sleep):
        yield step
        return None
    retries = max_retries if step.retry else 0
    attempt = 0
    while True:
        delay_s: float | None
        try:
            answer: Answer = yield step
        except ConnectionFailedError:
            if attempt == retries:
                raise
            delay_s = backoff_s(attempt)
        else:
            if _is_good(step, answer):
                return answer
            delay_s = retry_delay_s(answer, attempt)
            if attempt == retries or delay_s is None:
                raise error_of(answer)
        yield Sleep(delay_s)
        attempt += 1


def _is_good(request: Request, answer: Answer) -> bool:
    return 200 <= answer.status < 300 or answer.status in request.accept


def error_of(answer: Answer) -> APIError:
    """The exception for an answer with an error status, whatever its body holds."""
    try:
        error = answer.json().get("error")
    except InvalidResponseError:
        error = None
    if not isinstance(error, dict):
        error = {"message": f"HTTP {answer.status} from something that is not a loramux server"}
    return api_error(
        error,
        status=answer.status,
        request_id=answer.headers.get("x-request-id"),
        retry_after_s=retry_after_s(answer.headers),
    )


def identity(answer: Answer) -> tuple[str | None, str | None, str | None]:
    """The request's id, and of the adapter that answers (None for the base model) the digest and
    ``name@generation``."""
    digest, version = (
        None if (value := answer.headers.get(name)) == "base" else value
        for name in ("x-loramux-adapter", "x-loramux-model")
    )
    return answer.headers.get("x-request-id"), digest, version


def retry_delay_s(answer: Answer, attempt: int) -> float | None:
    """How long to wait before another try (``attempt`` have failed before), None for no other.

    ``x-should-retry`` decides if it is there, else the status; ``retry-after-ms`` or
    ``Retry-After`` say how long, else it is exponential backoff with jitter.
    """
    verdict = answer.headers.get("x-should-retry")
    if verdict not in ("true", "false"):
        verdict = "true" if answer.status in RETRY_STATUS or answer.status >= 500 else "false"
    if verdict == "false":
        return None
    asked = retry_after_s(answer.headers)
    if asked is None:
        return backoff_s(attempt)
    return asked if asked <= LONGEST_RETRY_AFTER_S else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asked to wait: ``retry-after-ms``, or ``Retry-After`` in either form."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else None


def backoff_s(attempt: int) -> float:
    """Doubles from half a second to eight, less up to a quarter so that clients spread out."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 9))
    return longest * random.uniform(0.75, 1.0)


class EventParser:
    """Server-sent events from bytes cut anywhere: ``feed`` gives the data of the events completed.

    Comments (keep-alives) and fields other than ``data`` are skipped; lines end in LF, CR or CRLF.
    """

    _LINE_END = re.compile(rb"\r\n|\n|\r")

    def __init__(self) -> None:
        self._rest = b""
        self._skip_lf = False
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        # A CR at the very end has already ended its line; the LF that may follow ends none.
        if self._skip_lf and data:
            data = data.removeprefix(b"\n")
            self._skip_lf = False
        if not data:
            return
        self._skip_lf = data.endswith(b"\r")
        *lines, self._rest = self._LINE_END.split(self._rest + data)
        for line in lines:
            if not line and self._data:
                event, self._data = b"\n".join(self._data), []
                yield event
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))


class StreamDecoder:
    """Bytes of an event stream to chunks. ``done`` once ``[DONE]`` was seen; ``end`` insists on it.

    ``feed`` raises the server's error for an error event, after the chunks that came before it.
    """

    def __init__(self, request_id: str | None = None) -> None:
        self.done = False
        self._events = EventParser()
        self._request_id = request_id

    def feed(self, data: bytes) -> Iterator[Chunk]:
        for event in self._events.feed(data):
            if self.done:
                return
            if event.startswith(b"[DONE]"):
                self.done = True
                return
            try:
                value = json.loads(event)
            except ValueError as exc:
                raise InvalidResponseError("an event of the stream is not JSON") from exc
            if isinstance(value, dict) and isinstance(error := value.get("error"), dict):
                raise api_error(error, request_id=self._request_id)
            yield Chunk.from_json(value)

    def end(self) -> None:
        if not self.done:
            raise IncompleteResponseError(
                f"the stream ended before it was done (request {self._request_id or 'unknown'})"
            )
