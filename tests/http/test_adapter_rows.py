"""Names, generations, limits and deletions as one tenant meets them, over the real front."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, PROMPT, SERVER, configure
from tests.http import wire
from tests.http.conftest import serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, grant
from tests.http.test_bad_inputs import refusal

from loramux.front.front import Front
from loramux.front.keys import Limits, editing

MAX_ADAPTERS = 4


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """A tenant with limits, of a server that has another tenant with the names tried here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path_factory.mktemp("rows"), port=0)
        key, rival = grant(config.keys_file, "acme"), grant(config.keys_file, "rival")
        with editing(config.keys_file) as content:
            content.tenants["acme"] = Limits(max_adapters=MAX_ADAPTERS, max_adapter_bytes=1000)
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        for name in ("cat", "n0", "going"):
            assert Tenant(server, rival).upload(name, b"the rival's").status_code == 201
        yield Tenant(server, key)
        stop()


NO_NAMES = [
    "",
    "..",
    ".",
    "a/b",
    "a\\b",
    "a,b",
    "a b",
    "a@1",
    "a:b",
    "-a",
    "a" * 97,
    "с\u0430t",
    "\0",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_none(acme: Tenant, name: str) -> None:
    assert refusal(acme.upload(name), 400)["param"] == "name"
    assert acme.names() == []


def test_the_longest_name(acme: Tenant) -> None:
    assert acme.upload("a" * 96).status_code == 201
    acme.delete("a" * 96)


def test_the_bases_name_is_taken(acme: Tenant) -> None:
    assert refusal(acme.upload("base"), 409)["code"] == "name_reserved"
    for method, path in (("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
        refusal(acme.ask(method, f"/v1/adapters/base{path}"), 403)


def test_generations(acme: Tenant) -> None:
    assert acme.upload("cat", b"1").json()["generation"] == 1
    assert refusal(acme.upload("cat", b"2"), 409)["code"] == "generation_conflict"
    for stale in (0, 2, 7):
        answer = acme.upload("cat", b"2", f"&expected_generation={stale}")
        assert refusal(answer, 409)["param"] == "expected_generation"
        assert answer.headers["x-should-retry"] == "false"
    answer = acme.upload("cat", b"2", "&expected_generation=1")
    assert (answer.status_code, answer.json()["generation"]) == (201, 2)
    assert acme.complete("cat@1").headers["x-loramux-adapter"] != answer.json()["digest"]
    acme.delete("cat")


def test_quotas(acme: Tenant) -> None:
    for i in range(MAX_ADAPTERS):
        assert acme.upload(f"n{i}", b"%d" % i).status_code == 201
    error = refusal(acme.upload("one-more", b"x"), 403)
    assert (error["code"], error["type"]) == ("quota_exceeded", "permission_error")
    assert str(MAX_ADAPTERS) in error["message"]
    refusal(acme.ask("GET", "/v1/adapters/one-more"), 404)
    assert acme.upload("n0", b"0").status_code == 200, "the same again is no more"
    for i in range(MAX_ADAPTERS):
        acme.delete(f"n{i}")
    error = refusal(acme.upload("fat", b"x" * 1001), 403)
    assert error["code"] == "quota_exceeded" and "1001" in error["message"]
    assert acme.upload("fat", b"x" * 1000).status_code == 201
    acme.delete("fat")


def test_deleting_under_a_stream(acme: Tenant) -> None:
    assert acme.upload("going", b"1").status_code == 201
    body = {"model": "going", "prompt": PROMPT, "max_tokens": 40, "stream": True}
    raw = wire.connect(acme.server)
    raw.sendall(
        wire.request(
            "/v1/completions",
            json.dumps({**body, "cache_salt": "delay=0.01"}).encode(),
            "content-type: application/json",
            f"authorization: Bearer {acme.key}",
        )
    )
    head = wire.read_until(raw, b"data: ")
    answer = acme.ask("DELETE", "/v1/adapters/going")
    assert (answer.status_code, answer.json()["status"]) == (202, "deleting")
    refusal(acme.complete("going"), 404)
    refusal(acme.ask("DELETE", "/v1/adapters/going"), 404)
    found: list[Any] = wire.events(head + wire.read_until(raw, b"0\r\n\r\n"))
    assert found[-1] is None
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]].count("length") == 1
    assert eventually(lambda: acme.names() == [])


def test_deleting_while_it_is_validated(acme: Tenant) -> None:
    files = {"config": b'{"wait": 1}', "weights": b"1"}
    answer = acme.ask("POST", "/v1/adapters", data={"name": "slow"}, files=files)
    assert (answer.status_code, answer.json()["status"]) == (202, "validating")
    assert acme.ask("DELETE", "/v1/adapters/slow").status_code == 202
    refusal(acme.ask("DELETE", "/v1/adapters/slow"), 404)
    refusal(acme.complete("slow"), 404)
    assert eventually(lambda: acme.names() == [])


def test_deleting_what_is_pinned(acme: Tenant) -> None:
    acme.upload("held", b"1")
    assert acme.ask("PUT", "/v1/adapters/held/pin").status_code == 200
    assert refusal(acme.ask("DELETE", "/v1/adapters/held"), 409)["code"] == "adapter_pinned"
    assert acme.complete("held").status_code == 200
    acme.ask("DELETE", "/v1/adapters/held/pin")
    acme.delete("held")
