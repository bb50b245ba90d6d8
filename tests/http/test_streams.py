"""Streams: their bytes, and every way in which they end early."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start, launch
from tests.http.fake_front import LONG, eventually, fails_after, speak, tokens

from loramux.errors import EngineFailed, Overloaded
from loramux.front.generation import GenerationSpec
from loramux.http.choices import Choices

COMPLETE: dict[str, Any] = {"model": "base", "prompt": "a", "max_tokens": 5}


async def drips(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
    """A token every 20 ms, for ever."""
    while True:
        yield tokens("y")
        await asyncio.sleep(0.02)


async def silence(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
    await asyncio.sleep(3600)
    yield []


def test_the_bytes_of_a_stream(shared: Running) -> None:
    shared.front.script = speak("hello")
    raw = wire.post(shared, "/v1/completions", stream=True, **COMPLETE | {"model": "shout"})
    answer = wire.read_until(raw, b"0\r\n\r\n")
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert wire.status(answer) == 200
    assert b"content-type: text/event-stream" in head and b"cache-control: no-cache" in head
    digest = shared.front.adapters.show("shout").digest
    assert b"x-loramux-adapter: " + digest.encode() in head and b"x-request-id: " in head
    assert answer.count(b"data: [DONE]\n\n") == 1
    found = wire.events(answer)
    assert found[-1] is None and None not in found[:-1]
    first = found[0]
    assert first.keys() == {"id", "object", "created", "model", "choices"}
    assert first["object"] == "text_completion" and first["model"] == "shout"
    assert first["choices"][0].keys() == {
        "index", "text", "logprobs", "finish_reason", "stop_reason"
    }  # fmt: skip
    raw.close()


def test_connections_are_kept_between_streams(shared: Running) -> None:
    shared.front.script = speak("hello")
    raw = wire.connect(shared)
    body = b'{"model":"base","prompt":"a","max_tokens":3,"stream":true}'
    for _ in range(3):
        raw.sendall(wire.request("/v1/completions", body, "content-type: application/json"))
        assert wire.events(wire.read_until(raw, b"0\r\n\r\n"))[-1] is None
    raw.close()


def test_streams_asked_for_at_once_on_one_connection_come_one_after_the_other(
    shared: Running,
) -> None:
    shared.front.script = speak("hello", delay_s=0.002)
    raw = wire.connect(shared)
    one, two = (
        wire.request(
            "/v1/completions",
            b'{"model":"base","prompt":"a","max_tokens":%d,"stream":true}' % num,
            "content-type: application/json",
        )
        for num in (20, 5)
    )
    raw.sendall(one + two)
    first = wire.read_until(raw, b"0\r\n\r\n")
    end = first.index(b"0\r\n\r\n") + 5
    second = first[end:]
    if not second.endswith(b"0\r\n\r\n"):
        second += wire.read_until(raw, b"0\r\n\r\n")
    for answer, num in ((first[:end], 20), (second, 5)):
        found = wire.events(answer)
        assert found[-1] is None and len({event["id"] for event in found[:-1]}) == 1
        text = "".join(event["choices"][0]["text"] for event in found[:-1])
        whole = shared.complete("a", max_tokens=num).json()
        assert text == whole["choices"][0]["text"]
    raw.close()


def test_return_token_ids(shared: Running) -> None:
    shared.front.script = speak("hello")
    raw = wire.post(shared, "/v1/completions", stream=True, return_token_ids=True, **COMPLETE)
    found = wire.events(wire.read_until(raw, b"0\r\n\r\n"))[:-1]
    ids = [choice.get("token_ids", []) for event in found for choice in event["choices"]]
    assert sum(ids, []) == (tokens("hello") + tokens("x") * 5)[:5]
    prompts = [
        c["prompt_token_ids"] for e in found for c in e["choices"] if "prompt_token_ids" in c
    ]
    assert prompts == [tokens("a")]
    whole = shared.complete("a", max_tokens=5, return_token_ids=True).json()["choices"][0]
    assert whole["token_ids"] == sum(ids, []) and whole["prompt_token_ids"] == tokens("a")
    chat = shared.chat("a", max_tokens=5, return_token_ids=True).json()
    assert chat["choices"][0]["token_ids"] == sum(ids, []) and chat["prompt_token_ids"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_leaving_aborts_at_once(shared: Running, path: str, stream: bool) -> None:
    """M9 and M10: both kinds of answer, every choice of the request."""
    front = shared.front
    front.script, before = drips, len(front.specs)
    gone = shared.metric("loramux_disconnect_aborts_total")
    body = {"prompt": ["a", "b"]} if path == "/v1/completions" else {}
    messages = {} if body else {"messages": [{"role": "user", "content": "a"}]}
    raw = wire.post(
        shared, path, model="base", n=2, stream=stream, max_tokens=100, **body, **messages
    )
    wanted = 4 if body else 2
    assert eventually(lambda: len(front.specs) == before + wanted)
    if stream:
        wire.read_until(raw, b"data: ")
    raw.close()
    ids = {spec.request_id for spec in front.specs[before:]}
    assert len(ids) == wanted
    assert eventually(lambda: ids <= set(front.aborted))
    assert not len(front.ledger) and front.reserved == 0
    time.sleep(0.3)  # the rendered metrics are a quarter of a second old at most
    assert shared.metric("loramux_disconnect_aborts_total") == gone + 1


def test_leaving_while_nothing_comes(shared: Running) -> None:
    """Between tokens nobody writes, so only a listener can notice."""
    shared.front.script, before = silence, len(shared.front.aborted)
    for stream in (True, False):
        num = len(shared.front.specs)
        raw = wire.post(shared, "/v1/completions", stream=stream, **COMPLETE)
        assert eventually(lambda num=num: len(shared.front.specs) == num + 1)
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()
    assert eventually(lambda: len(shared.front.aborted) == before + 2)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_leaving_with_more_requests_sent_ahead(
    more: int, shared: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the one that is being answered that ends, without a word of bugs; the others never
    begin."""
    front = shared.front
    front.script, before, aborted = drips, len(front.specs), len(front.aborted)
    body = json.dumps({**COMPLETE, "stream": True, "max_tokens": 100}).encode()
    raw = wire.connect(shared)
    raw.sendall(
        (1 + more) * wire.request("/v1/completions", body, "content-type: application/json")
    )
    wire.read_until(raw, b"data: ")
    raw.close()
    assert eventually(lambda: len(front.aborted) == aborted + 1)
    assert eventually(lambda: not len(front.ledger)) and front.reserved == 0
    assert shared.http.get("/health/live").status_code == 200
    assert len(front.specs) == before + 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_finished_request_is_not_aborted(shared: Running) -> None:
    shared.front.script, before = speak("hello"), list(shared.front.aborted)
    assert shared.complete(max_tokens=3).status_code == 200
    raw = wire.post(shared, "/v1/completions", stream=True, **COMPLETE)
    wire.read_until(raw, b"0\r\n\r\n")
    raw.close()
    assert shared.http.get("/health/live").status_code == 200
    assert shared.front.aborted == before


def test_of_a_request_refused_in_part_nothing_stays(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = shared.front.submit

    def third_time_unlucky(spec: GenerationSpec) -> Any:
        if spec.request_id.endswith("-2"):
            raise Overloaded("the engine has gone", code="engine_starting")
        return submit(spec)

    monkeypatch.setattr(shared.front, "submit", third_time_unlucky)
    shared.front.script = drips
    for stream in (True, False):
        answer = shared.complete("a", n=4, stream=stream, max_tokens=100)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert not len(shared.front.ledger) and shared.front.reserved == 0


@pytest.mark.parametrize("prompts", ["a", ["a", "b"]])
def test_failure_inside_a_stream_is_an_event_and_no_done(shared: Running, prompts: Any) -> None:
    shared.front.script = fails_after("hello", EngineFailed("the engine died"))
    body = COMPLETE | {"prompt": prompts, "max_tokens": 90}
    raw = wire.post(shared, "/v1/completions", stream=True, **body)
    found = wire.events(wire.read_until(raw, b"0\r\n\r\n"))
    assert None not in found and len(found) > 1
    assert found[-1] == {
        "error": {
            "message": "the engine died",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
    }
    assert not len(shared.front.ledger), "its twin does not run on"


def test_a_bug_says_nothing_of_itself_and_is_counted(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(choices: Choices, index: int) -> None:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(Choices, "stop_reason", bug)
    server = start()
    raw = wire.post(server, "/v1/completions", stream=True, **COMPLETE | {"max_tokens": 90})
    answer = wire.read_until(raw, b"0\r\n\r\n")
    found = wire.events(answer)
    assert found[-1]["error"]["code"] == "internal_error" and None not in found
    assert b"hunter2" not in answer
    refused = server.complete(max_tokens=90)
    assert refused.status_code == 500 and "hunter2" not in refused.text
    for stage in ("answer", "stream"):
        counted = f'loramux_errors_total{{stage="{stage}",type="server_error"}}'
        assert eventually(lambda name=counted: server.metric(name) == 1)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("error", [Overloaded("too late"), EngineFailed("it died")])
def test_failure_before_the_first_token_is_no_stream(
    shared: Running, path: str, error: Exception
) -> None:
    """And is counted as one before an answer, as that of a whole answer is."""
    shared.front.script = fails_after("", error)
    said = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    answers = [
        shared.http.post(path, json={"model": "base", "n": 2, "stream": stream, **said})
        for stream in (True, False)
    ]
    for answer in answers:
        assert answer.status_code == (503 if isinstance(error, Overloaded) else 500)
        assert answer.headers["content-type"] == "application/json"
        assert ("retry-after" in answer.headers) == isinstance(error, Overloaded)
    assert answers[0].json() == answers[1].json()
    assert not len(shared.front.ledger)


def test_failure_after_a_keep_alive_is_an_event(start: Start) -> None:
    server = start(keep_alive_s=0.02)

    async def late(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        await told.wait()
        yield Overloaded("too late")

    told = asyncio.Event()
    server.front.script = late
    raw = wire.post(server, "/v1/completions", stream=True, **COMPLETE)
    seen = wire.read_until(raw, b": keep-alive\n\n")
    assert wire.status(seen) == 200
    [task] = server.front.tasks
    task.get_loop().call_soon_threadsafe(told.set)
    rest = wire.read_until(raw, b"0\r\n\r\n")
    assert b'"code":"overloaded"' in rest and b"[DONE]" not in rest
    raw.close()


def test_failure_of_a_whole_answer_keeps_its_status(shared: Running) -> None:
    shared.front.script = fails_after("hello", EngineFailed("the engine died"))
    answer = shared.complete(["a", "b"], max_tokens=90)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
    assert not len(shared.front.ledger)


def test_silent_streams_are_kept_alive(start: Start) -> None:
    server = start(keep_alive_s=0.05)
    server.front.script = speak("hello", delay_s=0.2)
    raw = wire.post(server, "/v1/completions", stream=True, **COMPLETE | {"max_tokens": 2})
    answer = wire.read_until(raw, b"0\r\n\r\n")
    assert answer.count(b": keep-alive\n\n") >= 2
    assert wire.events(answer)[-1] is None
    raw.close()


NUM = 20_000
"""Tokens with five logprobs each: 9 MB of events."""


def big(server: Running) -> dict[str, Any]:
    """A request whose stream is far larger than every buffer between us and the client."""
    server.front.info = LONG
    return COMPLETE | {"max_tokens": NUM, "logprobs": 5}


async def all_but_the_last(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
    """However fast, it does not end before its reader is cut off."""
    for _ in range(NUM - 1):
        yield tokens("y")
    await asyncio.sleep(3600)


def test_a_reader_that_does_not_read_is_cut_off(start: Start) -> None:
    server = start(write_timeout_s=0.3)
    server.front.script = all_but_the_last
    raw = wire.post(server, "/v1/completions", small_buffer=True, stream=True, **big(server))
    assert eventually(lambda: len(server.front.aborted) == 1, within_s=30)
    assert eventually(lambda: not len(server.front.ledger))
    server.front.script = speak("hello")
    assert server.complete(max_tokens=3).status_code == 200
    answer = wire.read_all(raw)
    assert b"[DONE]" not in answer and not answer.endswith(b"0\r\n\r\n")
    raw.close()


def test_a_slow_reader_gets_everything_in_fewer_pieces(start: Start) -> None:
    server = start(write_timeout_s=30)
    body = big(server)
    raw = wire.post(server, "/v1/completions", small_buffer=True, stream=True, **body)
    end = lambda: server.front.snapshot.finished.get("length") == 1  # noqa: E731
    assert eventually(end, within_s=60), "the engine does not wait for the reader"
    raw.settimeout(30)
    found = wire.events(wire.read_until(raw, b"0\r\n\r\n"))
    assert found[-1] is None
    pieces = [event["choices"][0] for event in found[:-1]]
    assert len(pieces) < NUM, "what waited was merged"
    assert len("".join(piece["text"] for piece in pieces)) > NUM - 10
    tokens_seen = sum(len(piece["logprobs"]["tokens"]) for piece in pieces if piece["logprobs"])
    assert tokens_seen == NUM
    raw.close()


def test_streams_end_with_an_error_when_the_time_to_drain_is_over(model_dir: Path) -> None:
    server, stop = launch(model_dir, drain_s=0.2)
    server.front.script = drips
    raw = wire.post(server, "/v1/completions", stream=True, **COMPLETE | {"max_tokens": 100})
    wire.read_until(raw, b"data: ")
    stopper = threading.Thread(target=stop)
    stopper.start()
    answer = wire.read_until(raw, b"0\r\n\r\n")
    assert b'"code":"draining"' in answer and b"[DONE]" not in answer
    stopper.join(20)
    assert server.front.state == "stopped" and len(server.front.aborted) == 1
    raw.close()


def test_the_front_lives_as_long_as_the_server(model_dir: Path) -> None:
    server, stop = launch(model_dir)
    assert server.front.state == "started"
    stop()
    assert server.front.state == "stopped"
