"""Names, generations, limits and deletions as one tenant meets them, over the real front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, PROMPT, SERVER, configure
from tests.http import wire
from tests.http.conftest import serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, bearer, grant
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import expire

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


def blob(data: bytes) -> str:
    return f"/v1/blobs/sha256:{hashlib.sha256(data).hexdigest()}"


def test_files_without_an_adapter_count(acme: Tenant) -> None:
    """Blobs, and uploads as announced; what an adapter uses is counted once."""
    weights, other = b"w" * 500, b"o" * 300
    assert acme.ask("PUT", blob(weights), content=weights).status_code == 201
    named = {"name": "cat", "config": {}, "weights": blob(weights).rpartition("/")[2]}
    assert acme.ask("POST", "/v1/adapters?wait=30", json=named).status_code == 201
    assert acme.ask("PUT", blob(other), content=other).status_code == 201
    begin = {"bytes": 199, "sha256": hashlib.sha256(b"x" * 199).hexdigest()}
    upload = acme.ask("POST", "/v1/uploads", json=begin)
    assert upload.status_code == 201

    for body in (b"yz", iter([b"y", b"z"])):  # with its length, and without
        error = refusal(acme.ask("PUT", blob(b"yz"), content=body), 403)
        assert error["code"] == "quota_exceeded" and "999 bytes" in error["message"]
    refusal(acme.ask("POST", "/v1/uploads", json={**begin, "bytes": 2}), 403)
    refusal(acme.upload("dog", b"yz"), 403)
    assert acme.ask("HEAD", blob(b"yz")).status_code == 404

    assert acme.ask("PUT", blob(weights), content=weights).status_code == 200, "it is there"
    assert acme.ask("POST", "/v1/adapters?wait=30", json=named).status_code == 200
    assert acme.upload("dog", other).status_code == 201, "what waited is what the adapter uses"
    path = f"/v1/uploads/{upload.json()['id']}"
    key = bearer(acme.key) | {"upload-offset": "0"}
    assert acme.server.http.patch(path, content=b"x" * 199, headers=key).status_code == 204
    assert acme.ask("POST", f"{path}/complete").status_code == 201, "counted from its beginning"
    refusal(acme.ask("POST", "/v1/uploads", json={**begin, "bytes": 2}), 403)
    assert acme.ask("PUT", blob(b"1"), content=b"1").status_code == 201, "the very last byte"
    for name in ("cat", "dog"):
        acme.delete(name)
    refusal(acme.upload("dog", b"yz"), 403)  # the blobs are hers still
    expire(acme.server, "tenant_blobs", "tenant", "acme")
    assert acme.upload("dog", b"yz").status_code == 201
    acme.delete("dog")


def test_adapters_that_fail_keep_no_files_and_have_a_limit(acme: Tenant) -> None:
    for i in range(MAX_ADAPTERS):
        answer = acme.upload(f"bad{i}", b"bad %d" % i, bad=["no"])
        assert refusal(answer, 422)["problems"] == ["no"]
        assert eventually(lambda i=i: not stored(acme, b"bad %d" % i))
    error = refusal(acme.upload("worse", b"w", bad=["no"]), 403)
    assert error["code"] == "quota_exceeded" and "4 adapters that failed" in error["message"]
    refusal(acme.upload("bad1", b"bad 1", bad=["no"]), 422)
    assert acme.upload("bad0", b"good").status_code == 201, "a name may try again"
    for i in range(MAX_ADAPTERS):
        acme.delete(f"bad{i}")


def stored(tenant: Tenant, data: bytes) -> bool:
    folder: Path = tenant.server.front.config.data_dir / "blobs" / "sha256"
    digest = hashlib.sha256(data).hexdigest()
    return (folder / digest[:2] / digest).exists()


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
