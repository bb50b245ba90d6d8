"""What operators and tools ask."""

from __future__ import annotations

import threading

import pytest
import uvicorn
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually, tokens
from tests.http.test_bad_inputs import refusal

from loramux import __version__
from loramux.http.app import build_admin_app
from loramux.http.connection import uvicorn_config


def test_health(start: Start) -> None:
    server = start()
    answer = server.http.get("/health")
    assert answer.status_code == 200 and answer.content == b""
    assert server.http.get("/health/ready").json() == {"status": "ready", "reasons": []}
    server.front.reasons = ["engine_starting"]
    answer = server.http.get("/health")
    assert answer.status_code == 503 and answer.content == b""
    answer = server.http.get("/health/ready")
    assert answer.status_code == 503 and answer.json()["reasons"] == ["engine_starting"]
    assert server.http.get("/health/live").status_code == 200


def test_the_canary_is_asked_only_when_wanted(start: Start) -> None:
    server = start()
    server.front.sings = False
    assert server.http.get("/health/deep").json() == {"status": "ready", "reasons": []}
    answer = server.http.get("/health/deep?canary=1")
    assert answer.status_code == 503 and answer.json()["reasons"] == ["canary_mismatch"]
    server.front.sings = True
    assert server.http.get("/health/deep?canary=1").status_code == 200
    assert refusal(server.http.get("/health/deep?canary=2"), 400)["param"] == "canary"
    server.front.reasons = ["engine_starting"]
    answer = server.http.get("/health/deep?canary=1")
    assert answer.status_code == 503 and answer.json()["reasons"] == ["engine_starting"]


def test_version(shared: Running) -> None:
    assert shared.http.get("/version").json() == {"version": __version__}


def test_tokenize_and_back(shared: Running) -> None:
    answer = shared.post("/tokenize", model="shout", prompt="wörld 😀", return_token_strs=True)
    found = answer.json()
    assert found["tokens"] == tokens("wörld 😀") and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 128 and len(found["token_strs"]) == found["count"]
    back = shared.post("/detokenize", tokens=found["tokens"])
    assert back.json() == {"prompt": "wörld 😀"}
    chat = shared.post("/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    text = shared.post("/detokenize", tokens=chat["tokens"]).json()["prompt"]
    assert text == "<|user|>a</s>\n<|assistant|>"
    assert shared.post("/tokenize", prompt="").json()["tokens"] == []


def test_tokenize_is_what_a_request_counts(shared: Running) -> None:
    messages = [{"role": "user", "content": "hello"}]
    count = shared.post("/tokenize", messages=messages).json()["count"]
    assert shared.chat("hello", max_tokens=1).json()["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "a b"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.0]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_bad_tokens(shared: Running, path: str, body: dict, param: str) -> None:
    assert refusal(shared.post(path, **body))["param"] == param


def test_state(shared: Running) -> None:
    state = shared.http.get("/admin/state").json()
    assert state["version"] == __version__ and state["not_ready"] == []
    assert state["info"]["max_model_len"] == 128 and state["engine"] == {"kind": "state"}
    assert state["pool"]["total"] == 0 and state["prompts"] is True


def test_an_admin_port_of_its_own(start: Start) -> None:
    main = start(admin_port=1)
    for path in ("/metrics", "/health", "/health/ready", "/version", "/admin/state"):
        refusal(main.http.get(path), 404)
    refusal(main.post("/tokenize", prompt="a"), 404)
    assert main.complete(max_tokens=3).status_code == 200
    front = main.front
    server = uvicorn.Server(
        uvicorn_config(build_admin_app(front, front.config), front.config, port=0)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        admin = Running(front, server.servers[0].sockets[0].getsockname()[1])
        assert admin.http.get("/health").status_code == 200
        refusal(admin.http.get("/v1/models"), 404)
        text = admin.http.get("/metrics").text
        assert 'vllm:request_params_n_count{engine="0",model_name="base"} 1.0' in text
        admin.http.close()
    finally:
        server.should_exit = True
        thread.join(20)
    assert front.state == "started", "the main application starts and stops the front"


def test_openapi_describes_the_bodies(shared: Running) -> None:
    schema = shared.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    name = body["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "temperature" in schema["components"]["schemas"][name]["properties"]
    assert (
        "multipart/form-data" in schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    )
    assert "HTTPValidationError" not in str(schema)
