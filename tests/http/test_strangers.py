"""A web page that the user visits cannot use a server that asks for no key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.http import wire
from tests.http.conftest import Running, Start, launch
from tests.http.granting import bearer, grant
from tests.http.test_auth import ROUTES
from tests.http.test_bad_inputs import refusal

from loramux.config import ServerConfig

COMPLETION = json.dumps({"model": "base", "prompt": "a", "max_tokens": 2}).encode()
MULTIPART = b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nx\r\n--b--\r\n'

# What a form, fetch() or sendBeacon() of any page may send without asking first.
SIMPLE = [
    ("POST", "/v1/completions", "text/plain", COMPLETION),
    ("POST", "/v1/completions", "application/json", COMPLETION),
    ("POST", "/v1/completions", "application/x-www-form-urlencoded", b"a=b"),
    ("POST", "/v1/adapters", "multipart/form-data; boundary=b", MULTIPART),
    ("POST", "/v1/unload_lora_adapter", "text/plain", b'{"lora_name": "shout"}'),
    ("GET", "/v1/models", "", b""),
    ("OPTIONS", "/v1/completions", "", b""),
    ("DELETE", "/v1/adapters/shout", "", b""),
]


@pytest.fixture(scope="module")
def proxied(model_dir: Path) -> Iterator[Running]:
    server, stop = launch(model_dir, allowed_host=("LLM.example",))
    yield server
    stop()


def own(server: Running) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(("method", "path", "media", "body"), SIMPLE)
@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://localhost:1", "null", "", "http://127.0.0.1", "file://"],
)
def test_pages_of_other_sites(
    shared: Running, method: str, path: str, media: str, body: bytes, origin: str
) -> None:
    before = len(shared.front.specs), len(shared.front.adapters.writers)
    headers = {"origin": origin, **({"content-type": media} if media else {})}
    answer = shared.http.request(method, path, content=body, headers=headers)
    error = refusal(answer, 403)
    assert (error["code"], error["param"]) == ("origin_not_allowed", "Origin")
    assert not {name for name in answer.headers if name.startswith("access-control")}
    assert (len(shared.front.specs), len(shared.front.adapters.writers)) == before
    assert shared.http.get("/v1/adapters/shout").json()["status"] == "ready"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0",
     "10.0.0.1", "localhost@evil", "[::1", "[::ffff:127.0.0.1]", "evil/health?x=", "",
     "localhost:x"],
)  # fmt: skip
def test_names_that_were_made_to_lead_here(shared: Running, host: str) -> None:
    """DNS rebinding: to the browser the page is of the same site, so a GET has no Origin."""
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        error = refusal(shared.http.get("/v1/models", headers=headers), 403)
        assert (error["code"], error["param"]) == ("host_not_allowed", "Host")


def test_every_route_asks_who_it_is(shared: Running) -> None:
    for method, path in ROUTES:
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            assert shared.http.request(method, path, headers=headers).status_code == 403, path


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.8.9.1:80", "[::1]:8000"])
def test_programs_and_the_servers_own_pages(shared: Running, host: str) -> None:
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        assert shared.http.get("/v1/models", headers=headers).status_code == 200
    assert shared.complete(max_tokens=1).status_code == 200
    raw = wire.connect(shared)
    raw.sendall(b"GET /version HTTP/1.0\r\n\r\n")
    assert wire.status(wire.read_until(raw, b"version")) == 200, "no browser leaves Host out"


def test_a_second_host_header_does_not_help(shared: Running) -> None:
    for pair in (("localhost", "evil.example"), ("evil.example", "localhost")):
        lines = ["GET /v1/models HTTP/1.1", *(f"host: {host}" for host in pair), "", ""]
        raw = wire.connect(shared)
        raw.sendall("\r\n".join(lines).encode())
        assert wire.status(wire.read_until(raw, b"}}")) in (400, 403)


def test_allowed_hosts(proxied: Running) -> None:
    for host in ("llm.example", "LLM.example:443"):
        for origin in ({}, {"origin": f"https://{host}"}):
            answer = proxied.http.get("/v1/models", headers={"host": host, **origin})
            assert answer.status_code == 200
    for headers in (
        {"host": "llm.example.evil"},
        {"host": "llm.example", "origin": "https://evil.example"},
        {"host": own(proxied), "origin": "https://llm.example"},
    ):
        refusal(proxied.http.get("/v1/models", headers=headers), 403)


@pytest.mark.parametrize("name", ["https://llm.example", "llm.example:80", "*", ""])
def test_an_allowed_host_is_a_bare_name(name: str) -> None:
    with pytest.raises(ValidationError, match="no host name"):
        ServerConfig(allowed_host=(name,))


def test_with_keys_the_key_decides(start: Start, tmp_path: Path) -> None:
    """No browser adds a key by itself, and a server with keys has names of its own."""
    key = grant(tmp_path / "keys.json", "acme")
    server = start(data_dir=tmp_path)
    headers = {"host": "llm.example", "origin": "https://chat.example"}
    refusal(server.http.get("/v1/models", headers=headers), 401)
    answer = server.http.get("/v1/models", headers={**headers, **bearer(key)})
    assert answer.status_code == 200
