"""What both clients send and make of the answers, against a scripted server."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tests.client.conftest import Connect

from loramux_client import (
    AsyncClient,
    Client,
    ConflictError,
    ConnectionFailedError,
    ContextLengthExceededError,
    EngineFailedError,
    IncompleteResponseError,
    InvalidResponseError,
    NotFoundError,
    OverloadedError,
    RequestTimeoutError,
    _client,
)


class Script:
    """Replies in turn (an exception is raised) and remembers the requests."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def body(self, index: int = 0) -> Any:
        return json.loads(self.requests[index].content)


def completion(*texts: str, **more: Any) -> dict[str, Any]:
    choices = [{"index": i, "text": t, "finish_reason": "stop"} for i, t in enumerate(texts)]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "cmpl-1", "created": 7, "model": "m", "choices": choices, "usage": usage, **more}


def adapter(status: str = "ready", **more: Any) -> dict[str, Any]:
    return {"id": "a", "name": "a", "digest": "d" * 64, "status": status, "generation": 1, **more}


def failure(status: int, code: str, **headers: str) -> httpx.Response:
    error = {"message": "no", "type": "server_error", "param": "p", "code": code}
    hyphened = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": error}, headers=hyphened)


def events(*values: object, done: bool = True) -> bytes:
    lines = [json.dumps(value) for value in values] + ["[DONE]"] * done
    return b"".join(f": keep-alive\n\ndata: {line}\n\n".encode() for line in lines)


def piece(text: str) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": text}]}


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body in pieces; an exception among them is raised. ``closed`` when let go."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.closed = False
        self.taken = 0

    def __iter__(self) -> Iterator[bytes]:
        for item in self.pieces:
            self.taken += 1
            if isinstance(item, Exception):
                raise item
            yield item

    async def __aiter__(self) -> Any:
        for item in self:
            yield item

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def test_complete_sends_what_was_said_and_keeps_what_it_does_not_know(connect: Connect) -> None:
    details = {"cached_tokens": 2, "later": 1}
    answer = completion("hi", "ho", system_fingerprint="x")
    answer["usage"]["prompt_tokens_details"] = details
    answer["choices"][1]["stop_reason"] = 5
    headers = {"x-request-id": "r1", "x-loramux-adapter": "ab"}
    script = Script(httpx.Response(200, json=answer, headers=headers))
    client = connect(script, api_key="secret")
    got = client.call("complete", [1, 2], model="m", max_tokens=2, logit_bias={7: -1.5}, stop=["x"])
    (request,) = script.requests
    assert (request.method, request.url.path) == ("POST", "/v1/completions")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"] == "application/json"
    assert script.body() == {
        "prompt": [1, 2],
        "model": "m",
        "max_tokens": 2,
        "logit_bias": {"7": -1.5},
        "stop": ["x"],
        "stream": False,
    }
    assert got.text == "hi" and [c.text for c in got.choices] == ["hi", "ho"]
    assert (got.choices[0].finish_reason, got.choices[1].stop_reason) == ("stop", 5)
    assert (got.request_id, got.adapter_digest) == ("r1", "ab")
    assert got.usage.prompt_tokens_details.cached_tokens == 2
    assert got.usage.prompt_tokens_details.extra == {"later": 1}
    assert got.extra == {"system_fingerprint": "x"}


def test_what_came_of_guesses_and_of_two_models(connect: Connect) -> None:
    guessed = {"drafters": ["a"], "max_draft_tokens": 4, "tree": False, "acceptance": "exact"}
    guessed |= {"steps": 2, "drafted": 5, "accepted": 3}
    guessed["by_drafter"] = {"a": {"steps": 2, "drafted": 5, "accepted": 3}}
    turns = {"threshold": 1.5, "window": 5, "min_dwell": 8, "start": "small", "share_large": 0.25}
    turns |= {"tokens": {"large": 1, "small": 3}, "computed": {"large": 9, "small": 8}}
    answer = completion("hi")
    answer["usage"]["completion_tokens_details"] = {"accepted_prediction_tokens": 3}
    answer["usage"]["details"] = {"speculation": guessed, "lossless": False}
    answer["usage"]["details"]["entropy_adaptive"] = turns
    off = completion("hi")
    off["usage"]["details"] = {"speculation": "off", "lossless": True}
    odd = completion("hi")
    odd["usage"]["details"] = {"speculation": "sideways"}
    script = Script(*(httpx.Response(200, json=each) for each in (answer, off, odd)))
    client = connect(script)
    wish = {"drafters": ["a"], "max_draft_tokens": 4}
    turn = {"threshold": 1.5}
    usage = client.call("complete", "x", model="m", speculation=wish, entropy_adaptive=turn).usage
    assert script.body()["speculation"] == wish and script.body()["entropy_adaptive"] == turn
    assert usage.completion_tokens_details.accepted_prediction_tokens == 3
    told = usage.details.speculation
    assert (told.drafters, told.drafted, told.by_drafter["a"]["accepted"]) == (["a"], 5, 3)
    assert usage.details.lossless is False
    shared = usage.details.entropy_adaptive
    assert (shared.tokens.large, shared.computed.small, shared.share_large) == (1, 8, 0.25)
    usage = client.call("complete", "x", model="m", speculation="off").usage
    assert usage.details.speculation == "off" and usage.details.entropy_adaptive is None
    with pytest.raises(InvalidResponseError):
        client.call("complete", "x", model="m")


def test_chat(connect: Connect) -> None:
    message = {"role": "assistant", "content": "hello", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    reply = {"id": "1", "choices": [choice], "usage": None}
    script = Script(httpx.Response(200, json=reply, headers={"x-loramux-adapter": "base"}))
    messages = [{"role": "user", "content": "hi"}]
    got = connect(script).call("chat", messages, model="m", top_logprobs=2, logprobs=True)
    assert script.requests[0].url.path == "/v1/chat/completions"
    assert script.body()["messages"] == messages and script.body()["top_logprobs"] == 2
    assert got.text == "hello" and got.choices[0].message.extra == {"refusal": None}
    assert got.usage is None and got.adapter_digest is None


@pytest.mark.parametrize("root", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_models_wherever_the_url_ends(connect: Connect, root: str) -> None:
    cards = [{"id": "base", "root": "base"}, {"id": "a", "parent": "base", "max_model_len": 9}]
    script = Script(httpx.Response(200, json={"object": "list", "data": cards}))
    got = connect(script, base_url=root).call("models")
    assert str(script.requests[0].url) == "http://h:1/v1/models"
    assert [(m.id, m.parent, m.max_model_len) for m in got] == [
        ("base", None, None),
        ("a", "base", 9),
    ]


def test_health_is_an_answer_either_way(connect: Connect, pauses: list[float]) -> None:
    script = Script(
        httpx.Response(503, json={"reasons": ["starting"]}, headers={"retry-after": "1"}),
        httpx.Response(200, json={"reasons": []}),
    )
    client = connect(script)
    bad, good = client.call("health"), client.call("health")
    assert (bad.ready, bad.reasons, good.ready, good.reasons) == (False, ["starting"], True, [])
    assert pauses == []


def test_a_blend_is_asked_for_and_awaited(connect: Connect) -> None:
    script = Script(
        httpx.Response(202, json=adapter("validating", generation=3)),
        httpx.Response(200, json=adapter(generation=3)),
    )
    made = connect(script).call(
        "adapters.blend",
        "mix",
        method="ties",
        sources=["a@2", ("b", -0.5)],
        rank=8,
        density=0.25,
        expected_generation=2,
    )
    assert made.status == "ready"
    assert script.body() == {
        "name": "mix",
        "blend": {
            "method": "ties",
            "sources": [{"id": "a@2"}, {"id": "b", "weight": -0.5}],
            "rank": 8,
            "density": 0.25,
        },
        "expected_generation": 2,
    }
    assert script.requests[1].url.path == "/v1/adapters/a@3"


def test_adapter_verbs(connect: Connect) -> None:
    script = Script(
        httpx.Response(200, json={"object": "list", "data": [adapter(), adapter("failed")]}),
        httpx.Response(200, json=adapter(residency="pool", future=1)),
        httpx.Response(200, json=adapter(pinned=True)),
        httpx.Response(200, json=adapter(pinned=False)),
        httpx.Response(202, json=adapter("deleting")),
        httpx.Response(204),
    )
    client = connect(script)
    assert [a.status for a in client.call("adapters.list")] == ["ready", "failed"]
    shown = client.call("adapters.show", "a/../b c")
    assert shown.residency == "pool" and shown.extra == {"future": 1}
    assert client.call("adapters.pin", "a").pinned
    assert not client.call("adapters.unpin", "a").pinned
    assert client.call("adapters.delete", "a") is None
    assert client.call("adapters.delete", "a") is None
    assert [(r.method, r.url.raw_path.decode()) for r in script.requests] == [
        ("GET", "/v1/adapters"),
        ("GET", "/v1/adapters/a%2F..%2Fb%20c"),
        ("PUT", "/v1/adapters/a/pin"),
        ("DELETE", "/v1/adapters/a/pin"),
        ("DELETE", "/v1/adapters/a"),
        ("DELETE", "/v1/adapters/a"),
    ]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (lambda: failure(400, "context_length_exceeded"), ContextLengthExceededError),
        (lambda: failure(404, "model_not_found"), NotFoundError),
        (lambda: failure(409, "generation_conflict", x_should_retry="false"), ConflictError),
        (lambda: failure(500, "engine_failed", x_should_retry="false"), EngineFailedError),
        (lambda: httpx.ReadTimeout("slow"), RequestTimeoutError),
        (lambda: httpx.Response(200, text="<html>"), InvalidResponseError),
        (lambda: httpx.Response(200, json=[]), InvalidResponseError),
        (lambda: httpx.Response(200, json={"id": "1"}), InvalidResponseError),
        (lambda: httpx.Response(200, json={"id": "1", "choices": [3]}), InvalidResponseError),
        (
            lambda: httpx.Response(200, stream=Body(b"{", httpx.ReadError("x"))),
            IncompleteResponseError,
        ),
    ],
)
def test_what_is_not_tried_again(
    connect: Connect, pauses: list[float], reply: Callable[[], Any], error: type[Exception]
) -> None:
    script = Script(reply())
    with pytest.raises(error) as caught:
        connect(script).call("complete", "x", model="m")
    assert len(script.requests) == 1 and pauses == []
    if getattr(caught.value, "code", None):
        assert getattr(caught.value, "param", None) == "p"


def test_overload_is_waited_out_and_in_the_end_reported(
    connect: Connect, pauses: list[float]
) -> None:
    overloaded = [failure(503, "overloaded", retry_after_ms="1500") for _ in range(5)]
    script = Script(*overloaded[:2], httpx.Response(200, json=completion("ok")), *overloaded[2:])
    client = connect(script)
    assert client.call("complete", "x", model="m").text == "ok"
    with pytest.raises(OverloadedError) as caught:
        client.call("complete", "x", model="m")
    assert caught.value.retry_after_s == 1.5 and pauses == [1.5] * 4


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.RemoteProtocolError]
)
def test_connections_that_fail_are_tried_again(
    connect: Connect, pauses: list[float], error: type[httpx.TransportError]
) -> None:
    script = Script(error("x"), error("x"), httpx.Response(200, json=completion("ok")))
    assert connect(script).call("complete", "x", model="m").text == "ok"
    assert len(pauses) == 2
    with pytest.raises(ConnectionFailedError, match=error.__name__):
        connect(Script(error("")), max_retries=0).call("complete", "x", model="m")


def test_stream_of_a_completion(connect: Connect) -> None:
    usage = {"id": "c", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    body = Body(events(piece("a"), piece("b"), usage))
    headers = {"x-request-id": "r1", "x-loramux-adapter": "ab"}
    script = Script(httpx.Response(200, stream=body, headers=headers))
    stream = connect(script).open("x", model="m", seed=3)
    assert script.body() == {"prompt": "x", "model": "m", "seed": 3, "stream": True}
    assert (stream.stream.request_id, stream.stream.adapter_digest) == ("r1", "ab")
    chunks = stream.rest()
    assert [c.text for c in chunks] == ["a", "b", ""]
    assert chunks[-1].usage.completion_tokens == 2 and body.closed


def test_stream_of_a_chat_that_nobody_entered(connect: Connect) -> None:
    deltas: list[dict[str, str]] = [{"role": "assistant"}, {"content": "hi"}, {}]
    chunks = [{"id": "c", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    script = Script(httpx.Response(200, stream=Body(events(*chunks))))
    got = connect(script).chunks(messages=[{"role": "user", "content": "x"}], model="m")
    assert script.requests[0].url.path == "/v1/chat/completions"
    assert [c.text for c in got] == ["", "hi", ""]
    assert got[0].choices[0].delta.role == "assistant"


def test_stream_is_opened_again_until_it_begins_and_never_after(
    connect: Connect, pauses: list[float]
) -> None:
    body = Body(events(piece("a"), done=False), httpx.ReadError("gone"))
    script = Script(
        httpx.ConnectError("x"), failure(503, "overloaded"), httpx.Response(200, stream=body)
    )
    stream = connect(script).open("x", model="m")
    assert len(pauses) == 2 and stream.next().text == "a"
    with pytest.raises(IncompleteResponseError, match="gone"):
        stream.next()
    assert len(script.requests) == 3 and body.closed


def test_stream_refused(connect: Connect) -> None:
    with pytest.raises(NotFoundError):
        connect(Script(failure(404, "model_not_found"))).open("x", model="m")


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (
            events({"error": {"code": "engine_failed", "message": "m"}}, done=False),
            EngineFailedError,
        ),
        (b"", IncompleteResponseError),
        (b"data: {\n\n", InvalidResponseError),
    ],
)
def test_stream_that_does_not_end_well_raises(
    connect: Connect, last: bytes, error: type[Exception]
) -> None:
    body = Body(events(piece("a"), done=False), last)
    stream = connect(Script(httpx.Response(200, stream=body))).open("x", model="m")
    assert stream.next().text == "a"
    with pytest.raises(error):
        stream.next()
    assert body.closed


def test_stream_is_whole_after_done_even_if_the_connection_then_breaks(connect: Connect) -> None:
    body = Body(events(piece("a")), httpx.ReadError("late"))
    stream = connect(Script(httpx.Response(200, stream=body))).open("x", model="m")
    assert [c.text for c in stream.rest()] == ["a"]


@pytest.mark.parametrize("num_read", [0, 1])
def test_closing_a_stream_lets_the_connection_go(connect: Connect, num_read: int) -> None:
    body = Body(events(piece("a"), done=False), events(piece("b")))
    stream = connect(Script(httpx.Response(200, stream=body))).open("x", model="m")
    for _ in range(num_read):
        stream.next()
    stream.close()
    assert body.closed and body.taken == num_read
    assert stream.rest() == []


@pytest.mark.parametrize("arguments", [{}, {"prompt": "x", "messages": []}])
def test_stream_wants_a_prompt_or_messages(connect: Connect, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="prompt or messages"):
        connect(Script()).open(model="m", **arguments)


def test_streaming_is_not_an_option_of_complete(connect: Connect) -> None:
    with pytest.raises(TypeError, match="stream"):
        connect(Script()).call("complete", "x", model="m", stream=True)


def test_arguments_that_make_no_client(connect: Connect) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Client("127.0.0.1:8000")
    with pytest.raises(ValueError, match="max_retries"):
        AsyncClient("http://x", max_retries=-1)


VERBS = ["complete", "chat", "stream", "models", "health", "close"]
ADAPTER_VERBS = ["push", "blend", "list", "show", "delete", "pin", "unpin"]


@pytest.mark.parametrize("verb", VERBS + ADAPTER_VERBS)
def test_both_clients_have_the_same_documented_verbs(verb: str) -> None:
    blocking: Any = Client if verb in VERBS else _client.Adapters
    awaited: Any = AsyncClient if verb in VERBS else _client.AsyncAdapters
    one, other = getattr(blocking, verb), getattr(awaited, verb)
    assert one.__doc__ and one.__doc__ == other.__doc__
    signature = inspect.signature(one)
    assert list(signature.parameters)[0] == "self"
    assert signature.parameters == inspect.signature(other).parameters
