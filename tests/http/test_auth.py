"""Nothing without a key, nothing without the scope: every route, and every way around them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from tests.http import wire
from tests.http.conftest import Running, Start, launch
from tests.http.fake_front import eventually
from tests.http.granting import bearer, client, grant, look_again
from tests.http.test_bad_inputs import refusal

from loramux.cli import main
from loramux.config import ServerConfig
from loramux.errors import ConfigError
from loramux.front.keys import Keys
from loramux.http.app import build_admin_app, build_app
from loramux.http.auth import Guard, Strangers, check_host
from loramux.http.connection import uvicorn_config
from loramux.http.serve import serve

# What each route needs. A new route is added here by hand: that is the point.
OPEN: set[str] = set()
INFER, UPLOAD, ADMIN = {"infer"}, {"upload"}, {"admin"}
ANY = INFER | UPLOAD | ADMIN
ROUTES: dict[tuple[str, str], set[str]] = {
    ("GET", "/openapi.json"): ANY,
    ("HEAD", "/openapi.json"): ANY,
    ("POST", "/v1/completions"): INFER,
    ("POST", "/v1/chat/completions"): INFER,
    ("GET", "/v1/models"): INFER,
    ("GET", "/v1/models/{model:path}"): INFER,
    ("POST", "/v1/adapters"): UPLOAD,
    ("GET", "/v1/adapters"): INFER | UPLOAD,
    ("GET", "/v1/adapters/{name}"): INFER | UPLOAD,
    ("GET", "/v1/adapters/{name}/versions"): INFER | UPLOAD,
    ("DELETE", "/v1/adapters/{name}"): UPLOAD,
    ("PUT", "/v1/adapters/{name}/ttl"): UPLOAD,
    ("PUT", "/v1/adapters/{name}/pin"): UPLOAD,
    ("DELETE", "/v1/adapters/{name}/pin"): UPLOAD,
    ("GET", "/v1/aliases"): INFER | UPLOAD,
    ("GET", "/v1/aliases/{alias}"): INFER | UPLOAD,
    ("PUT", "/v1/aliases/{alias}"): UPLOAD,
    ("DELETE", "/v1/aliases/{alias}"): UPLOAD,
    ("GET", "/v1/capacity"): INFER | UPLOAD,
    ("HEAD", "/v1/blobs/{digest:path}"): UPLOAD,
    ("PUT", "/v1/blobs/{digest:path}"): UPLOAD,
    ("POST", "/v1/uploads"): UPLOAD,
    ("HEAD", "/v1/uploads/{id}"): UPLOAD,
    ("PATCH", "/v1/uploads/{id}"): UPLOAD,
    ("POST", "/v1/uploads/{id}/complete"): UPLOAD,
    ("DELETE", "/v1/uploads/{id}"): UPLOAD,
    ("POST", "/v1/load_lora_adapter"): ADMIN,
    ("POST", "/v1/unload_lora_adapter"): UPLOAD,
    ("GET", "/"): OPEN,
    ("GET", "/page/{name}"): OPEN,
    ("GET", "/health"): OPEN,
    ("GET", "/health/live"): OPEN,
    ("GET", "/health/ready"): OPEN,
    ("GET", "/health/deep"): ADMIN,
    ("GET", "/version"): OPEN,
    ("POST", "/tokenize"): INFER,
    ("POST", "/detokenize"): INFER,
    ("GET", "/admin/state"): ADMIN,
    ("GET", "/metrics"): ADMIN,
}
EVERY = [pytest.param(*route, id=" ".join(route)) for route in ROUTES]


@dataclass
class House:
    """A server with keys: one per scope, one that was revoked."""

    server: Running
    path: Path
    keys: dict[str, str]
    revoked: str

    def ask(self, method: str, path: str, headers: Any = None) -> Any:
        path = re.sub(r"{[^}]*}", "nobody", path)
        return self.server.http.request(method, path, headers=headers)


@pytest.fixture(scope="module")
def house(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    path = tmp_path_factory.mktemp("auth") / "keys.json"
    keys = {scope: grant(path, "acme", scope) for scope in ("infer", "upload", "admin")}  # type: ignore[arg-type]
    revoked = grant(path, "acme")
    main(["keys", "revoke", revoked.split("_")[1], "--api-keys", str(path)])
    server, stop = launch(model_dir, api_keys=path)
    yield House(server, path, keys, revoked)
    stop()


def routes(app: Any) -> set[tuple[str, str]]:
    while not isinstance(app, FastAPI):
        app = app.app
    return {(method, route.path) for route in app.routes for method in route.methods}  # type: ignore[attr-defined]


def test_the_list_of_routes_here_is_whole(house: House) -> None:
    front = house.server.front
    assert routes(build_app(front, front.config)) == set(ROUTES)
    assert routes(build_admin_app(front, front.config)) < set(ROUTES)


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_without_a_key(house: House, method: str, path: str) -> None:
    stranger = house.keys["infer"][:-4] + "AAAA"
    bodies = []
    for headers in (None, bearer("x"), bearer(stranger), bearer(house.revoked)):
        answer = house.ask(method, path, headers)
        if ROUTES[method, path]:
            assert answer.status_code == 401, answer.text
            assert answer.headers["www-authenticate"] == "Bearer"
            bodies.append(answer.content)
        else:
            assert answer.status_code == (404 if "{" in path else 200)
    assert len(set(bodies)) <= 1, "the answer does not tell why"
    if bodies and method != "HEAD":
        error = refusal(house.ask(method, path), 401)
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_with_each_scope(house: House, method: str, path: str) -> None:
    needs = ROUTES[method, path]
    for scope, key in house.keys.items():
        answer = house.ask(method, path, bearer(key))
        if not needs or scope in needs:
            assert answer.status_code not in (401, 403), answer.text
        elif method == "HEAD":  # which has no body
            assert answer.status_code == 403
        else:
            error = refusal(answer, 403)
            assert (error["code"], error["type"]) == ("insufficient_scope", "permission_error")
            assert all(name in error["message"] for name in needs)


def test_a_route_that_declares_nothing_is_a_bug(house: House) -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    access = {(method, "/openapi.json"): frozenset({"infer"}) for method in ("GET", "HEAD")}
    keys, strangers = house.server.front.keys, Strangers(())
    Guard(app, access, keys, strangers)
    app.add_api_route("/forgotten", lambda: None, methods=["GET"])
    with pytest.raises(RuntimeError, match="/forgotten"):
        Guard(app, access, keys, strangers)
    app.mount("/page", FastAPI())
    with pytest.raises(RuntimeError):
        Guard(app, {**access, ("GET", "/forgotten"): frozenset()}, keys, strangers)


AROUND = [
    ("GET", "//v1/models"),
    ("GET", "/V1/models"),
    ("GET", "/v1/models/"),
    ("GET", "/v1/adapters/"),
    ("GET", "/health/../v1/models"),
    ("GET", "/health/%2e%2e/v1/models"),
    ("GET", "/health%2f..%2fv1/models"),
    ("GET", "/%2e%2e/v1/models"),
    ("GET", "/v1/models/%2e%2e/%2e%2e/health"),
    ("GET", "/v1/models;/health"),
    ("GET", "/v1/models?/health"),
    ("GET", "/v1/models#/health"),
    ("GET", "/health/"),
    ("GET", "/HEALTH"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/page"),
    ("GET", "/page/"),
    ("GET", "/page/../v1/models"),
    ("GET", "/page/%2e%2e/v1/models"),
    ("GET", "/nothing"),
    ("HEAD", "/v1/models"),
    ("OPTIONS", "/v1/models"),
    ("OPTIONS", "*"),
    ("TRACE", "/v1/models"),
    ("CONNECT", "/v1/models"),
    ("GET", "/v1/completions"),
    ("FROB", "/v1/models"),
    ("get", "/v1/models"),
    ("GET", "http://evil/health"),
]


@pytest.mark.parametrize(("method", "path"), AROUND)
@pytest.mark.parametrize("host", ["x", "evil/health?x=", "x:1/health#"])
def test_ways_around(house: House, method: str, path: str, host: str) -> None:
    def ask(*headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"host: {host}", "connection: close", *headers]
        raw = wire.connect(house.server)
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        return wire.read_all(raw)

    key = "authorization: Bearer " + house.keys["infer"]
    if path == "http://evil/health":  # an absolute form names the path it means
        assert wire.status(ask()) in (200, 400)
        return
    assert wire.status(ask()) in (400, 401)
    wanted = (200,) if path.startswith(("/v1/models?", "/v1/models#")) else (400, 404, 405)
    assert wire.status(ask(key)) in wanted


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.mark.parametrize("spell", ["{}", "{}/", "/{}", "/health{}", "/%2e%2e{}", "{}%00", "UPPER"])
def test_every_spelling_of_every_route(house: House, spell: str) -> None:
    """Whatever the path means in the end, without a key it gets no further than open routes do."""
    key = house.keys["admin"]
    for path in {path for _, path in ROUTES}:
        concrete = re.sub(r"{[^}]*}", "nobody", path)
        url = concrete.upper() if spell == "UPPER" else spell.format(concrete)
        for method in METHODS:
            allowed = {401}
            if any(ROUTES.get((m, path)) == OPEN for m in METHODS):
                allowed |= {404, 405}
                if url == concrete and (method, path) in ROUTES:
                    allowed = {200, 404}
            raw = house.server.http.build_request(method, "/")
            raw.url = raw.url.copy_with(raw_path=f"{url}?api_key={key}".encode())
            assert house.server.http.send(raw).status_code in allowed, (method, url)


def test_a_wrong_method_on_an_open_route_is_no_secret(house: House) -> None:
    for method in ("HEAD", "POST", "OPTIONS"):
        assert house.ask(method, "/health").status_code == 405


def test_how_a_key_may_be_given(house: House) -> None:
    key = house.keys["infer"]
    for good in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}"):
        assert house.ask("GET", "/v1/models", {"authorization": good}).status_code == 200
    for bad in (
        {"authorization": key},
        {"authorization": f"Basic {key}"},
        {"authorization": f"Bearer\t{key}"},
        {"authorization": f"Bearer {key},{key}"},
        {"authorization": f"Bearer {key} {key}"},
        {"authorization": f"Bearer{key}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer " + "A" * 20_000},
        {"authorization": "Bearer \xe9".encode("latin-1")},
        {"x-api-key": key},
        {"proxy-authorization": f"Bearer {key}"},
        {"cookie": f"authorization=Bearer {key}"},
    ):
        refusal(house.ask("GET", "/v1/models", bad), 401)
    refusal(house.ask("GET", f"/v1/models?api_key={key}&authorization=Bearer%20{key}"), 401)


def test_two_keys_are_one_too_many(house: House) -> None:
    good = ("authorization", f"Bearer {house.keys['infer']}")
    for pair in (
        [good, good],
        [good, ("Authorization", "Bearer x")],
        [("authorization", ""), good],
    ):
        assert refusal(house.ask("GET", "/v1/models", pair), 400)["param"] == "authorization"


def test_no_body_is_read_before_the_key_is_checked(house: House) -> None:
    writers = house.server.front.adapters.writers
    for path, length in (("/v1/adapters", 10**6), ("/v1/adapters", 10**12), ("/nothing", 10**12)):
        raw = wire.connect(house.server)
        raw.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {length}"
            "\r\ncontent-type: multipart/form-data; boundary=B\r\n\r\n".encode()
        )
        answer = wire.read_until(raw, b"invalid_api_key")
        assert wire.status(answer) == 401, "and no 100 before it"
        raw.close()
    assert writers == []


def test_the_command_line_shows_its_key(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = ["adapters", "--url", house.server.url]
    assert main([*listing, "list"]) == 1
    assert "invalid_api_key" in capsys.readouterr().err
    assert main([*listing, "--api-key", house.keys["upload"], "list"]) == 0
    monkeypatch.setenv("LORAMUX_API_KEY", house.keys["infer"])
    assert main([*listing, "list"]) == 0
    assert main([*listing, "pin", "shout"]) == 1
    assert "insufficient_scope" in capsys.readouterr().err


def test_open_routes_do_not_look_at_keys(house: House) -> None:
    twice = [("authorization", "Bearer x"), ("authorization", "y")]
    assert house.ask("GET", "/health", twice).status_code == 200


def test_a_refused_request_leaves_the_connection_usable(house: House) -> None:
    refusal(house.server.complete(), 401)
    me = client(house.server, house.keys["infer"])
    assert me.complete(max_tokens=2).status_code == 200
    assert me.chat(n=2, max_tokens=2).status_code == 200
    assert [spec.tenant for spec in house.server.front.specs[-3:]] == ["acme"] * 3


def test_revoking_works_while_serving(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = grant(path, "acme")
    server = start(api_keys=path)
    me = client(server, text)
    assert me.http.get("/v1/models").status_code == 200
    main(["keys", "revoke", text.split("_")[1], "--api-keys", str(path)])
    look_again(server)
    refusal(me.http.get("/v1/models"), 401)
    refusal(server.http.get("/v1/models"), 401)
    path.unlink()
    look_again(server)
    refusal(server.http.get("/v1/models"), 401)


def test_the_first_key_closes_an_open_server(start: Start, tmp_path: Path) -> None:
    server = start(data_dir=tmp_path)
    headers = [("authorization", "Bearer anything"), ("authorization", "twice")]
    assert server.http.get("/v1/models", headers=headers).status_code == 200
    assert server.http.get("/metrics").status_code == 200
    text = grant(tmp_path / "keys.json", "acme")
    look_again(server)
    refusal(server.http.get("/v1/models"), 401)
    assert server.http.get("/v1/models", headers=bearer(text)).status_code == 200


def test_the_admin_port_checks_too(house: House) -> None:
    front = house.server.front
    server = uvicorn.Server(
        uvicorn_config(build_admin_app(front, front.config), front.config, port=0)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        admin = Running(front, server.servers[0].sockets[0].getsockname()[1])
        for method, path in routes(build_admin_app(front, front.config)):
            answer = admin.http.request(method, re.sub(r"{[^}]*}", "nobody", path))
            assert (answer.status_code == 401) == bool(ROUTES[method, path]), path
        refusal(admin.http.get("/metrics"), 401)
        refusal(admin.http.get("/metrics", headers=bearer(house.keys["infer"])), 403)
        assert admin.http.get("/metrics", headers=bearer(house.keys["admin"])).status_code == 200
        admin.http.close()
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_without_keys_on_loopback(tmp_path: Path, host: str) -> None:
    check_host(Keys(tmp_path / "keys.json"), host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "::ffff:127.0.0.1", "localhost.evil", "example.org"]
)
def test_without_keys_anywhere_else(tmp_path: Path, host: str) -> None:
    config = ServerConfig(host=host, data_dir=tmp_path)
    with pytest.raises(ConfigError, match="loramux keys create"):
        serve(config)
    grant(config.keys_file, "acme")
    check_host(Keys(config.keys_file), host)
