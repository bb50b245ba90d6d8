"""The sans-IO core: event streams cut anywhere, retries as a table, no socket and no clock."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_client import (
    APIError,
    ConnectionFailedError,
    EngineFailedError,
    IncompleteResponseError,
    InvalidResponseError,
    OverloadedError,
    RequestTimeoutError,
)
from loramux_client._protocol import (
    Answer,
    EventParser,
    Flow,
    Request,
    Sleep,
    StreamDecoder,
    backoff_s,
    json_request,
    retry_after_s,
    retrying,
)

EVENT_STREAMS = [
    (b"", []),
    (b"data: a\n\n", [b"a"]),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    (b"data: a\r\rdata:b\r\r", [b"a", b"b"]),
    (b"data:  two\n\n", [b" two"]),
    (b": keep-alive\n\n: again\n\ndata: a\n\n", [b"a"]),
    (b"data: one\n: inside\ndata: two\n\n", [b"one\ntwo"]),
    (b"event: x\nid: 7\nretry: 9\ndata: a\n\n", [b"a"]),
    (b"data\n\n", [b""]),
    (b"\n\n\r\n\r\rdata: a\n\n\n\n", [b"a"]),
    ("data: 你好 🜚\n\n".encode(), ["你好 🜚".encode()]),
    (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
    (b"data: unfinished\n", []),
    (b"data: unfinished", []),
    (b"database: no\n\n", []),
]


@pytest.mark.parametrize(("stream", "events"), EVENT_STREAMS)
def test_events_do_not_depend_on_where_the_bytes_are_cut(
    stream: bytes, events: list[bytes]
) -> None:
    whole = EventParser()
    assert list(whole.feed(stream)) == events
    by_byte = EventParser()
    assert [e for i in range(len(stream)) for e in by_byte.feed(stream[i : i + 1])] == events
    for cut in range(len(stream) + 1):
        parser = EventParser()
        pieces = (stream[:cut], b"", stream[cut:])
        assert [e for piece in pieces for e in parser.feed(piece)] == events


@given(st.lists(st.sampled_from([b"data: x", b"data", b":", b"\r", b"\n", b"\r\n", b"y"])))
def test_any_soup_of_lines_gives_the_same_events_byte_by_byte(pieces: list[bytes]) -> None:
    stream = b"".join(pieces)
    by_byte = EventParser()
    events = [e for i in range(len(stream)) for e in by_byte.feed(stream[i : i + 1])]
    assert events == list(EventParser().feed(stream))


def sse(*values: object) -> bytes:
    events = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
    return b"".join(f"data: {event}\n\n".encode() for event in events)


def chunk(text: str) -> dict[str, object]:
    return {"id": "c", "choices": [{"index": 0, "text": text}]}


def test_stream_of_chunks_ends_with_done_wherever_it_is_cut() -> None:
    stream = sse(chunk("é"), chunk("🜚!"), "[DONE]")
    for cut in range(len(stream) + 1):
        decoder = StreamDecoder()
        texts = [c.text for part in (stream[:cut], stream[cut:]) for c in decoder.feed(part)]
        assert texts == ["é", "🜚!"] and decoder.done
        decoder.end()


def test_what_follows_done_is_ignored() -> None:
    decoder = StreamDecoder()
    assert [c.text for c in decoder.feed(sse(chunk("a"), "[DONE]", chunk("b")))] == ["a"]
    assert list(decoder.feed(sse({"error": {"message": "late"}}))) == []
    decoder.end()


@pytest.mark.parametrize("stream", [b"", sse(chunk("a")), sse(chunk("a"), "[DONE]")[:-1]])
def test_a_stream_without_done_is_incomplete(stream: bytes) -> None:
    decoder = StreamDecoder("req-1")
    list(decoder.feed(stream))
    with pytest.raises(IncompleteResponseError, match="req-1"):
        decoder.end()


def test_an_error_event_raises_after_the_chunks_before_it() -> None:
    error = {"message": "gone", "type": "server_error", "param": None, "code": "engine_failed"}
    decoder = StreamDecoder("req-1")
    got = []
    with pytest.raises(EngineFailedError) as caught:
        for piece in decoder.feed(sse(chunk("a"), {"error": error}, chunk("b"))):
            got.append(piece.text)
    assert got == ["a"]
    assert caught.value.body == error and caught.value.request_id == "req-1"
    assert caught.value.status is None


@pytest.mark.parametrize("event", ["{", "[]", "3", '{"choices": []}', '{"id": "x"}', '"\udc80"'])
def test_an_event_that_is_no_chunk_is_refused(event: str) -> None:
    with pytest.raises(InvalidResponseError):
        list(StreamDecoder().feed(b"data: " + event.encode("utf-8", "surrogateescape") + b"\n\n"))


def run(
    replies: list[Answer | Exception], max_retries: int = 2, request: Request | None = None
) -> tuple[object, list[float], int]:
    """Drive one request against scripted replies: (result or error, pauses, attempts)."""

    def once() -> Flow[Answer]:
        answer: Answer = yield request or Request("GET", "/x")
        return answer

    flow = retrying(once(), max_retries)
    pauses: list[float] = []
    attempts = 0
    step = next(flow)
    while True:
        try:
            if isinstance(step, Sleep):
                pauses.append(step.seconds)
                step = flow.send(None)
                continue
            reply = replies[attempts]
            attempts += 1
            step = flow.throw(reply) if isinstance(reply, Exception) else flow.send(reply)
        except StopIteration as stop:
            return stop.value, pauses, attempts
        except Exception as exc:
            return exc, pauses, attempts


def failing(status: int, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, headers or {}, b'{"error": {"message": "no"}}')


GOOD = Answer(200, {}, b"{}")


@pytest.mark.parametrize(
    ("status", "headers", "tried_again"),
    [
        (408, {}, True),
        (409, {}, True),
        (429, {}, True),
        (500, {}, True),
        (503, {}, True),
        (507, {}, True),
        (400, {}, False),
        (404, {}, False),
        (422, {}, False),
        (301, {}, False),
        (409, {"x-should-retry": "false"}, False),
        (507, {"x-should-retry": "false", "retry-after": "1"}, False),
        (400, {"x-should-retry": "true"}, True),
        (503, {"x-should-retry": "perhaps"}, True),
        (400, {"x-should-retry": "perhaps"}, False),
        (400, {"retry-after": "1"}, False),
        (503, {"retry-after": "61"}, False),
        (503, {"x-should-retry": "true", "retry-after-ms": "60001"}, False),
    ],
)
def test_which_answers_are_tried_again(
    status: int, headers: dict[str, str], tried_again: bool
) -> None:
    result, pauses, attempts = run([failing(status, headers), GOOD])
    if tried_again:
        assert result is GOOD and attempts == 2 and len(pauses) == 1
    else:
        assert isinstance(result, APIError) and result.status == status
        assert attempts == 1 and pauses == []


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "60"}, 60),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "nan", "retry-after": "9"}, 9),
        ({"retry-after": "2.5"}, 2.5),
    ],
)
def test_the_server_says_how_long_to_wait(headers: dict[str, str], pause: float) -> None:
    assert run([failing(503, headers), GOOD])[1] == [pause]


@pytest.mark.parametrize("text", ["", "soon", "-1", "inf", "nan", "1e3", "١", "9" * 400])
def test_a_retry_after_that_is_no_time_is_as_if_it_was_not_there(text: str) -> None:
    assert retry_after_s({"retry-after": text}) is None
    (pause,) = run([failing(503, {"retry-after": text}), GOOD])[1]
    assert 0.375 <= pause <= 0.5


def test_retry_after_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 15 < (retry_after_s({"retry-after": date}) or 0) <= 20
    assert retry_after_s({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0


def test_backoff_doubles_up_to_eight_seconds_with_jitter() -> None:
    for attempt, longest in enumerate([0.5, 1, 2, 4, 8, 8, 8]):
        pauses = [backoff_s(attempt) for _ in range(50)]
        assert 0.75 * longest <= min(pauses) < max(pauses) <= longest
    assert backoff_s(5000) <= 8


@pytest.mark.parametrize("max_retries", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "failure", [lambda: failing(503), lambda: ConnectionFailedError("refused")]
)
def test_it_gives_up_after_max_retries_with_the_last_failure(
    max_retries: int, failure: Callable[[], Answer | Exception]
) -> None:
    result, pauses, attempts = run([failure() for _ in range(9)], max_retries)
    assert isinstance(result, (OverloadedError, ConnectionFailedError))
    assert attempts == max_retries + 1 and len(pauses) == max_retries


@pytest.mark.parametrize("error", [IncompleteResponseError, RequestTimeoutError, KeyError])
def test_what_may_have_been_done_is_not_done_again(error: type[Exception]) -> None:
    result, pauses, attempts = run([error("x"), GOOD])
    assert isinstance(result, error) and attempts == 1 and pauses == []


def test_a_request_may_forbid_retries_and_accept_an_error_status() -> None:
    once = Request("GET", "/x", retry=False)
    assert run([failing(503), GOOD], request=once)[2] == 1
    accepting = Request("GET", "/x", accept=frozenset({503}))
    answer = failing(503)
    assert run([answer], request=accepting)[0] is answer


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "text"}', b"{}", b"\xff"])
def test_an_error_from_something_else_still_has_a_status(body: bytes) -> None:
    result, _, _ = run([Answer(502, {"x-request-id": "r"}, body)], max_retries=0)
    assert isinstance(result, APIError)
    assert (result.status, result.code, result.request_id) == (502, None, "r")
    assert "502" in str(result)


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_request("POST", "/x", {"temperature": float("nan")})
