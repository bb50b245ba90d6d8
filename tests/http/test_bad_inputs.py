"""Every wrong request gets its own answer: status, code, the parameter's name, and no echo."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import row

SECRET = "hunter2hunter2"

# (body changes beside {"model": "base", "prompt": "a"}, param of the 400)
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {SECRET: 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100.0}, "max_tokens"),
    ({"max_tokens": 10**300}, "max_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1_000_000}, "n"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 3}, "best_of"),
    ({"n": 16, "prompt": ["a"] * 64}, "n"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": "x" * 1_000_000}, "stop"),
    ({"stop": [1, 2]}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": [[1, 2], [320]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1, 2.0]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": ["a"] * 10_000}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": SECRET}}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": ["fine", "not \udfff fine"]}, "prompt"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": 1}},
        "stream_options",
    ),
    ({"echo": "yes"}, "echo"),
    ({"suffix": SECRET}, "suffix"),
    ({"priority": 1}, "priority"),
    ({"priority": False}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 1.1}, "length_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": "../../etc"}, "model"),
    ({"model": "a,b"}, "model"),
    ({"model": "a\nb"}, "model"),
    ({"model": "nul\x00"}, "model"),
    ({"model": "a" * 10_000}, "model"),
    ({"adapter_id": "a b"}, "adapter_id"),
    ({"adapter_id": "shout", "model": "whisper"}, "adapter_id"),
    ({"adapter_id": 1}, "adapter_id"),
    ({"scale": 1.0}, "scale"),
    ({"scale": "1", "model": "shout"}, "scale"),
    ({"scale": 100.5, "model": "shout"}, "scale"),
    ({"scale": True, "model": "shout"}, "scale"),
    ({"adapters": []}, "adapters"),
    ({"adapters": "shout"}, "adapters"),
    ({"adapters": ["shout"]}, "adapters[0]"),
    ({"adapters": [{"id": "shout"}] * 9}, "adapters"),
    ({"adapters": [{"scale": 1.0}]}, "adapters[0].id"),
    ({"adapters": [{"id": "shout", "scale": -101}]}, "adapters[0]"),
    ({"adapters": [{"id": "shout"}, {"id": "a b"}]}, "adapters[1].id"),
    ({"adapters": [{"id": "base"}]}, "adapters[0].id"),
    ({"adapters": [{"id": "shout"}, {"id": "lonely"}]}, "adapters[1].id"),
    ({"adapters": [{"id": "shout"}], "model": "whisper"}, "model"),
    ({"adapters": [{"id": "shout"}], "adapter_id": "shout"}, "adapters"),
    ({"adapters": [{"id": "shout"}], "scale": 1.0}, "scale"),
]

CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, "messages[1].role"),
    ({"messages": [{"role": SECRET, "content": "a"}]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]},
        "messages[0]",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages[0]",
    ),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"n": 17}, "n"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
]


def refusal(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error object, its shape checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert {"message", "type", "param", "code"} <= body["error"].keys()
    assert SECRET not in answer.text, "input is never echoed"
    assert len(answer.text) < 2000
    error: dict[str, Any] = body["error"]
    return error


def label(case: tuple[dict[str, Any], str]) -> str:
    return json.dumps(case[0])[:50]


@pytest.mark.parametrize("case", COMPLETIONS, ids=label)
def test_completions(shared: Running, case: tuple[dict[str, Any], str]) -> None:
    body = {"model": "base", "prompt": "a", **case[0]}
    error = refusal(send(shared, "/v1/completions", body))
    assert error["param"] == case[1] and error["type"] == "invalid_request_error"
    assert str(error["param"]).partition("[")[0] in error["message"]
    assert not shared.front.ledger._entries and shared.front.reserved == 0


@pytest.mark.parametrize("case", CHATS, ids=label)
def test_chats(shared: Running, case: tuple[dict[str, Any], str]) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}], **case[0]}
    error = refusal(send(shared, "/v1/chat/completions", body))
    assert error["param"] == case[1] and error["type"] == "invalid_request_error"
    assert not shared.front.ledger._entries and shared.front.reserved == 0


def send(server: Running, path: str, body: Any) -> Any:
    """As json.dumps writes it: NaN and lone surrogates included."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(path, content=raw, headers={"content-type": "application/json"})


HARMLESS = {
    "user": "me", "metadata": {"a": "b"}, "suffix": None, "best_of": 2, "n": 2, "priority": 0,
    "length_penalty": 1.0, "use_beam_search": False, "response_format": {"type": "text"},
    "spaces_between_special_tokens": True, "prompt_logprobs": None, "prompt_embeds": None,
    "logit_bias": {"0": -100, "319": 100.0}, "stop": None, "seed": -(2**63), "top_k": -1,
    "cache_salt": "x" * 1024, "temperature": 0, "stream": False, "stream_options": None,
    "allowed_token_ids": [], "logprobs": None, "echo": False, "stop_token_ids": [319],
    "ignore_eos": True, "min_tokens": 0, "max_tokens": 3, "top_p": 1, "min_p": 0,
    "vllm_xargs": {}, "adapter_id": "shout",
}  # fmt: skip


def test_harmless_values_pass(shared: Running) -> None:
    answer = send(shared, "/v1/completions", {"model": "base", "prompt": "a", **HARMLESS})
    assert answer.status_code == 200, answer.text
    spec = shared.front.specs[-1]
    assert spec.sampling.seed == -(2**63) and spec.sampling.top_k == 0
    assert spec.sampling.stop_token_ids == (319,), "EOS is ignored as asked"
    assert spec.sampling.logit_bias == {0: -100.0, 319: 100.0}
    assert spec.cache_salt == "x" * 1024
    digest = shared.front.adapters.show("shout").digest
    assert spec.adapters[0].digest == digest == answer.headers["x-loramux-adapter"]


@pytest.mark.parametrize("text", ["\x00", "\u202e", "👨‍👩‍👧" * 3, " ", "é\u0301"])
def test_odd_text_is_text(shared: Running, text: str) -> None:
    assert shared.complete(text, echo=True).json()["choices"][0]["text"].startswith(text)


def test_context_is_checked_before_queueing(shared: Running) -> None:
    num = len(shared.front.specs)
    for body in (
        {"prompt": [5] * 128},
        {"prompt": [5] * 1_000_000},
        {"prompt": "x" * 1000},
        {"prompt": [5] * 100, "max_tokens": 29},
        {"prompt": [[5], [5] * 113]},
        {"prompt": [5] * 128, "max_tokens": 0, "echo": True},
    ):
        error = refusal(send(shared, "/v1/completions", {"model": "base", **body}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    error = refusal(shared.chat("x" * 1000))
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert len(shared.front.specs) == num
    assert shared.complete([5] * 100, max_tokens=28).status_code == 200


RAW: list[tuple[str, bytes]] = [
    ("depth", b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    ("object depth", b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    ("digits", b'{"max_tokens": ' + b"9" * 5000 + b"}"),
    ("duplicate", b'{"model": "base", "prompt": "a", "model": "hunter2hunter2"}'),
    ("nested duplicate", b'{"model": "base", "prompt": "a", "logit_bias": {"1": 1, "1": 2}}'),
    ("bom", b'\xef\xbb\xbf{"model": "base", "prompt": "a"}'),
    ("utf8", b'{"model": "base", "prompt": "\xff\xfe"}'),
    ("utf16", '{"model": "base", "prompt": "a"}'.encode("utf-16")),
    ("empty", b""),
    ("array", b'["hunter2hunter2"]'),
    ("string", b'"hunter2hunter2"'),
    ("null", b"null"),
    ("truncated", b'{"model": "base", "prompt": "hunter2hunter2'),
    ("trailing", b'{"model": "base", "prompt": "a"} hunter2hunter2'),
    ("surrogate key", b'{"model": "base", "prompt": "a", "\\ud800": 1}'),
    ("surrogate model", b'{"model": "\\udc00", "prompt": "a"}'),
    ("unknown NaN", b'{"model": "base", "prompt": "a", "foo": [{"x": NaN}]}'),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("raw", [raw for _, raw in RAW], ids=[name for name, _ in RAW])
def test_bytes_that_are_no_request(shared: Running, path: str, raw: bytes) -> None:
    error = refusal(send(shared, path, raw))
    assert error["type"] == "invalid_request_error"


def test_infinity_by_exponent(shared: Running) -> None:
    raw = b'{"model": "base", "prompt": "a", "temperature": 1e999}'
    assert refusal(send(shared, "/v1/completions", raw))["param"] == "temperature"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/detokenize"])
def test_media_types(shared: Running, path: str, headers: dict[str, str]) -> None:
    answer = shared.http.post(path, content=b'{"model":"base","prompt":"a"}', headers=headers)
    assert refusal(answer, 415)["code"] == "unsupported_media_type"


def test_media_type_with_a_charset(shared: Running) -> None:
    answer = shared.http.post(
        "/v1/completions",
        content=b'{"model":"base","prompt":"a"}',
        headers={"content-type": "Application/JSON; charset=UTF-8", "content-encoding": "identity"},
    )
    assert answer.status_code == 200


def test_unknown_fields_are_counted_or_refused(shared: Running, start: Start) -> None:
    before = shared.metric("loramux_unknown_fields_total")
    assert shared.complete(foo=1, bar=None).status_code == 200
    assert shared.chat(foo=1).status_code == 200
    time.sleep(0.3)  # the rendered metrics are a quarter of a second old at most
    assert shared.metric("loramux_unknown_fields_total") == before + 3
    strict = start(strict_fields=True)
    assert refusal(strict.complete(foo=1))["param"] == "foo"
    assert refusal(strict.chat(zoo=1))["param"] == "zoo"
    assert strict.complete(user="me", best_of=1, suffix=None).status_code == 200


def test_models_that_do_not_exist_are_alike(shared: Running) -> None:
    shared.front.adapters.put(row("zapped", status="deleting"))
    texts = set()
    for model in ("nobody", "zapped", "nobody/else", "base@2"):
        error = refusal(shared.complete(model=model), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        texts.add(error["message"].replace(model, "X"))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("model", "status", "code", "again"),
    [
        ("slow", 409, "adapter_not_ready", "true"),
        ("broken", 409, "adapter_failed", "false"),
        ("alien", 409, "adapter_incompatible", "false"),
        ("shout@1", 404, "generation_gone", "false"),
    ],
)
def test_adapters_that_cannot_answer(
    shared: Running, model: str, status: int, code: str, again: str
) -> None:
    answer = shared.complete(model=model)
    assert refusal(answer, status)["code"] == code
    assert answer.headers["x-should-retry"] == again
    assert ("retry-after" in answer.headers) == (again == "true")


def test_every_route_refuses_other_methods(shared: Running) -> None:
    paths = shared.http.get("/openapi.json").json()["paths"]
    assert len(paths) >= 15
    for path, operations in paths.items():
        url = path.replace("{name}", "x").replace("{model}", "x")
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - {
            method.upper() for method in operations
        }:
            answer = shared.http.request(method, url)
            error = refusal(answer, 405)
            assert error["code"] == "method_not_allowed"
            assert {m.strip() for m in answer.headers["allow"].split(",")}


@pytest.mark.parametrize(
    "path",
    ["/docs", "/redoc", "//v1/models", "/V1/models", "/v1/models/", "/v1/completions/",
     "/v1/%2e%2e/metrics", "/v1", "/v1/adapters/a/b", "/metrics/", "/v1/adapters/x/pin/"],
)  # fmt: skip
def test_odd_paths(shared: Running, path: str) -> None:
    answer = shared.http.request("GET", shared.url + path, follow_redirects=False)
    assert refusal(answer, 404)["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_x", True), ("", False), ("a b", False), ("x" * 129, False), ("é", False)],
)
def test_request_ids(shared: Running, given: str, kept: bool) -> None:
    for path in ("/version", "/nothing", "/v1/models"):
        answer = shared.http.get(path, headers=[(b"x-request-id", given.encode())])
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.headers["x-request-id"]


def test_a_bug_is_an_internal_error_without_words(shared: Running) -> None:
    def bug(name: str) -> Any:
        raise RuntimeError(SECRET)

    show, shared.front.adapters.show = shared.front.adapters.show, bug
    raw = wire.connect(shared)
    try:
        error = refusal(shared.http.get("/v1/adapters/x"), 500)
        for _ in range(2):
            raw.sendall(wire.request("/v1/adapters/x", b"", method="GET"))
            assert wire.status(wire.read_until(raw, b"}}")) == 500
            time.sleep(0.1)  # for a connection that is closed after all
    finally:
        shared.front.adapters.show = show
    assert error["code"] == "internal_error" and error["type"] == "server_error"
