"""What a client wrote is in no log and no metric, wherever it wrote it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, PROMPT, SERVER, configure
from tests.http import wire
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.granting import bearer, grant

from loramux.cli import main
from loramux.front.front import Front

SECRET = "hunter2hunter2"
"""Planted wherever a client can write."""


def plant(server: Running, key: str) -> Iterator[tuple[int, str]]:
    """(status, text) of requests that carry SECRET, each in another place."""

    def ask(method: str, path: str, headers: Any = None, **fields: Any) -> tuple[int, str]:
        answer = server.http.request(
            method, path, headers={**bearer(key), **(headers or {})}, **fields
        )
        return answer.status_code, answer.text

    ok = {"model": "base", "prompt": PROMPT, "max_tokens": 3}
    s, chat = SECRET, {"model": "base", "max_tokens": 3}
    for body in (
        {**ok, "prompt": s},
        {**ok, "prompt": s, "echo": True, "stream": True},
        {**ok, "user": s, "stop": [s], "cache_salt": s, s: s, "metadata": {s: s}},
        {**ok, "prompt": [s, s * 999]},
        {**ok, "model": s},
        {**ok, "model": s + "\n"},
        {**ok, "adapters": [{"id": s}]},
        {**ok, "adapter_id": s},
        {**ok, "logit_bias": {s: 1}},
        {**ok, "speculation": s},
        {**ok, "suffix": s},
    ):
        yield ask("POST", "/v1/completions", json=body)
    for content in (
        s,
        [{"type": "text", "text": s}],
        [{"type": "image_url", "image_url": s}],
        {s: s},
    ):
        messages = [{"role": "user", "content": content, "name": s}]
        yield ask("POST", "/v1/chat/completions", json={**chat, "messages": messages})
        yield ask("POST", "/tokenize", json={"messages": messages})
    yield ask("POST", "/tokenize", json={"prompt": s})
    yield ask("POST", "/v1/completions", content=f'{{"{s}": {s}'.encode())
    yield ask("POST", "/v1/completions", {"content-type": f"text/{s}"}, content=s)
    for path in (
        f"/{s}",
        f"/v1/adapters/{s}",
        f"/v1/models/{s}",
        f"/v1/aliases/{s}",
        f"/v1/uploads/{s}/x",
    ):
        yield ask("GET", path)
        yield ask("DELETE", path)
        yield ask("PUT", path + "/pin", json={"target": s})
    yield ask("GET", f"/v1/models?api_key={s}&{s}={s}#{s}")
    yield ask("GET", f"/v1/capacity?tokens={s}")
    yield ask("POST", f"/v1/adapters?wait={s}")
    yield ask("HEAD", f"/v1/blobs/sha256:{s}")
    yield ask("PUT", f"/v1/blobs/sha256:{'a' * 64}", content=s)
    yield ask("POST", "/v1/uploads", json={"bytes": 1, "sha256": s})
    yield ask("POST", "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": f"/{s}"})
    yield ask("PUT", f"/v1/aliases/{s}", json={"target": "base"})
    for name, config in (("leak", {}), ("leaky", {"bad": [s, s]}), (f"{s}!", {}), ("le", {s: s})):
        files = {
            "config": (f"../{s}.json", json.dumps(config)),
            "weights": (f"{s}.bin", s.encode()),
        }
        yield ask("POST", "/v1/adapters?wait=30", data={"name": name}, files=files)
    yield ask("POST", "/v1/adapters", data={s: s}, files={s: (s, s)})
    for headers in (
        {"x-secret": s, "user-agent": s, "cookie": s, "referer": f"http://x/{s}", "origin": s},
        {"authorization": f"Bearer {s}"},
        {"authorization": f"{s} {s}"},
        {"x-request-id": f"{s} {s}"},
        {"traceparent": s, "host": s, "content-encoding": s, "upload-offset": s},
    ):
        yield ask("POST", "/v1/completions", headers, json=ok)
    for line in (f"GET /{s} {s}", f"{s} / HTTP/1.1", f"GET http://{s}/{s} HTTP/1.1"):
        raw = wire.connect(server)
        raw.sendall(f"{line}\r\nhost: {s}\r\n{s}: {s}\r\n\r\n".encode())
        yield wire.status(wire.read_until(raw, b"}}")), ""


def test_nothing_that_a_client_wrote_is_in_a_log_or_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every logger at its most talkative, the children's output too; keys, their texts included."""
    caplog.set_level(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path, port=0, log_level="debug")
        key = grant(config.keys_file, "acme")
        revoked = grant(config.keys_file, "acme")
        assert (
            main(["keys", "revoke", revoked.split("_")[1], "--api-keys", str(config.keys_file)])
            == 0
        )
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        try:
            assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
            capfd.readouterr()
            answers = list(plant(server, key))
            server.http.get("/v1/models", headers=bearer(revoked))
            metrics = server.http.get("/metrics", headers=bearer(key)).text
        finally:
            stop()
    statuses = [status for status, _ in answers]
    assert statuses.count(200) > 8 and statuses.count(201) > 1 and 500 not in statuses
    assert any(SECRET in text for _, text in answers), "an echo: the secrets did arrive"
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    logged = "\n".join(f"{r.name} {r.getMessage()} {r.exc_text} {vars(r)}" for r in ours)
    assert "loramux.access" in logged and "/v1/completions" in logged
    output = "".join(capfd.readouterr())
    for secret in (SECRET, key, revoked, key.split("_")[2]):
        for place, text in (("a log", logged), ("output", output), ("/metrics", metrics)):
            found = [line for line in text.splitlines() if secret in line]
            assert not found, f"{place}: {found[:3]}"


_opened: list[tuple[str, str]] = []
_watching = False


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _watching and SECRET in repr(args):
        _opened.append((event, repr(args)))


def test_no_path_and_no_host_of_a_request_is_opened(tmp_path: Path) -> None:
    """Python says of every file it opens, name it resolves and module it imports."""
    global _watching
    sys.addaudithook(_audit)  # for ever: it cannot be taken away, only told to look elsewhere
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path, port=0)
        key = grant(config.keys_file, "acme")
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        try:
            assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
            _watching = True
            assert len(list(plant(server, key))) > 50
        finally:
            _watching = False
            stop()
    assert _opened == []
