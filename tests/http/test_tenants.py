"""Two tenants of one server see nothing of each other, and the same shared adapters.

The real front with scripted processes: what a tenant could learn, it would learn over HTTP.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, SERVER, configure
from tests.http.conftest import serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, bearer, grant
from tests.http.test_bad_inputs import refusal

from loramux.front.front import Front


@dataclass
class House:
    alice: Tenant
    bob: Tenant
    operator: Tenant


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "common").mkdir()
    (folder / "common" / "adapter_config.json").write_text("{}")
    (folder / "common" / "adapter_model.safetensors").write_bytes(b"common")
    (folder / "hollow").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        adapter = (f"common={folder / 'common'}", f"hollow={folder / 'hollow'}")
        config = configure(folder, port=0, adapter=adapter)
        alice = grant(config.keys_file, "alice", "infer", "upload")
        bob = grant(config.keys_file, "bob", "infer", "upload")
        operator = grant(config.keys_file, "operator")
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        yield House(*(Tenant(server, key) for key in (alice, bob, operator)))
        stop()


def everything(tenant: Tenant, name: str, digest: str) -> list[tuple[int, str]]:
    """Every answer that could tell whether ``name`` exists, with the name taken out of it."""
    short = digest[:12]
    answers = [
        tenant.complete(name),
        tenant.complete(f"{name}@1"),
        tenant.complete(f"{name}@2"),
        tenant.complete(f"{name}@sha256:{short}"),
        tenant.complete("base", adapter_id=name),
        tenant.ask("POST", "/v1/chat/completions", json={"model": name, "messages": [HELLO]}),
        tenant.ask("POST", "/tokenize", json={"model": name, "prompt": "a"}),
        tenant.ask("POST", "/detokenize", json={"model": name, "tokens": [5]}),
        tenant.ask("GET", f"/v1/models/{name}"),
        tenant.ask("GET", f"/v1/models/{name}@1"),
        tenant.ask("GET", f"/v1/adapters/{name}"),
        tenant.ask("GET", f"/v1/adapters/{name}@1"),
        tenant.ask("DELETE", f"/v1/adapters/{name}"),
        tenant.ask("PUT", f"/v1/adapters/{name}/pin"),
        tenant.ask("DELETE", f"/v1/adapters/{name}/pin"),
    ]
    return [(answer.status_code, answer.text.replace(name, "NAME")) for answer in answers]


HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize("state", ["ready", "failed", "validating", "replaced", "pinned"])
def test_another_tenants_name_is_a_name_that_never_was(house: House, state: str) -> None:
    alice, bob = house.alice, house.bob
    config: dict[str, Any] = {"bad": ["no"]} if state == "failed" else {}
    if state == "validating":
        config = {"wait": 2}
        alice.ask("POST", "/v1/adapters", data={"name": "secret"}, files=files(config, b"1"))
    else:
        alice.upload("secret", b"1", **config)
    if state == "replaced":
        now = alice.ask("GET", "/v1/adapters/secret").json()["generation"]
        replaced = alice.upload("secret", b"2", f"&expected_generation={now}")
        assert replaced.status_code == 201, replaced.text
    if state == "pinned":
        assert alice.ask("PUT", "/v1/adapters/secret/pin").status_code == 200
    mine = alice.ask("GET", "/v1/adapters/secret").json()
    assert mine["status"] == (state if state in ("failed", "validating") else "ready")
    seen = everything(bob, "secret", mine["digest"])
    assert seen == everything(bob, "never-there", mine["digest"])
    assert {status for status, _ in seen} == {404}
    assert "secret" not in bob.names() and "secret" not in bob.models()
    assert "secret" not in house.operator.names(), "an operator's key has a tenant like any other"
    assert alice.ask("GET", "/v1/adapters/secret").json()["name"] == "secret"
    if state == "pinned":
        alice.ask("DELETE", "/v1/adapters/secret/pin")
    alice.delete("secret")
    gone = everything(alice, "secret", mine["digest"])
    assert gone == everything(alice, "never-there", mine["digest"]), "deleted, like never there"
    text = house.operator.ask("GET", "/metrics").text
    assert "never-there" not in text, "asking for a name makes no series"


def files(config: Any, weights: bytes) -> dict[str, bytes]:
    return {"config": json.dumps(config).encode(), "weights": weights}


def test_one_name_two_tenants(house: House) -> None:
    alice, bob = house.alice, house.bob
    one = alice.upload("cat", b"one")
    error = refusal(bob.upload("cat", b"two", "&expected_generation=1"), 409)
    assert "generation is 0" in error["message"], "as for a name nobody has"
    two = bob.upload("cat", b"two")
    assert (one.status_code, two.status_code) == (201, 201)
    assert one.json()["generation"] == two.json()["generation"] == 1
    for tenant, view in ((alice, one.json()), (bob, two.json())):
        assert tenant.complete("cat").headers["x-loramux-adapter"] == view["digest"]
        assert tenant.ask("GET", "/v1/adapters/cat").json()["digest"] == view["digest"]
        assert tenant.ask("GET", "/v1/models/cat").status_code == 200
    refusal(alice.complete(f"cat@sha256:{two.json()['digest'][:12]}"), 404)
    alice.delete("cat")
    refusal(alice.complete("cat"), 404)
    assert bob.complete("cat").status_code == 200
    bob.delete("cat")


def test_equal_bytes_are_two_adapters(house: House) -> None:
    """They share files, and neither an answer nor a fate."""
    alice, bob = house.alice, house.bob
    assert alice.upload("dog", b"same").status_code == 201
    answer = bob.upload("dog", b"same")
    assert answer.status_code == 201, "not 200: bob never had it"
    assert alice.ask("PUT", "/v1/adapters/dog/pin").json()["pinned"]
    assert bob.ask("GET", "/v1/adapters/dog").json()["pinned"] is False
    alice.ask("DELETE", "/v1/adapters/dog/pin")
    alice.delete("dog")
    assert bob.complete("dog").headers["x-loramux-adapter"] == answer.json()["digest"]
    again = bob.upload("dog", b"same")
    assert (again.status_code, again.json()) == (200, answer.json())
    bob.delete("dog")


def test_shared_adapters(house: House) -> None:
    alice, bob, operator = house.alice, house.bob, house.operator
    for tenant in (alice, bob, operator):
        assert "common" in tenant.names() and "common" in tenant.models()
        assert tenant.complete("common").status_code == 200
        assert tenant.complete("common@1").status_code == 200
        assert refusal(tenant.complete("hollow"), 409)["code"] == "adapter_failed"
    for method, path in (("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
        for name in ("common", "hollow"):
            error = refusal(alice.ask(method, f"/v1/adapters/{name}{path}"), 403)
            assert error["code"] == "insufficient_scope" and "admin" in error["message"]
    shared = bob.complete("common").headers["x-loramux-adapter"]
    answer = alice.upload("common", b"common")
    assert answer.status_code == 201, "not 200: the one that is there is not hers"
    assert alice.ask("DELETE", "/v1/adapters/common").status_code == 202
    own = alice.upload("common", b"alice's").json()
    assert own["generation"] == 2 and own["digest"] != shared
    assert alice.complete("common").headers["x-loramux-adapter"] == own["digest"]
    assert bob.complete("common").headers["x-loramux-adapter"] == shared
    assert alice.names().count("common") == 1
    refusal(alice.complete(f"common@sha256:{shared[:12]}"), 404)
    alice.delete("common")
    assert alice.complete("common").headers["x-loramux-adapter"] == shared
    assert operator.ask("PUT", "/v1/adapters/common/pin").json()["pinned"]
    assert bob.ask("GET", "/v1/adapters/common").json()["pinned"]
    assert operator.ask("DELETE", "/v1/adapters/common/pin").status_code == 200
    assert operator.ask("DELETE", "/v1/adapters/hollow").status_code == 202
    refusal(alice.complete("hollow"), 404)


def test_an_operators_own_upload_is_not_shared(house: House) -> None:
    assert house.operator.upload("common", b"operator's").status_code == 201
    shared = house.alice.complete("common").headers["x-loramux-adapter"]
    assert house.operator.complete("common").headers["x-loramux-adapter"] != shared
    house.operator.delete("common")
    assert house.operator.complete("common").headers["x-loramux-adapter"] == shared


def test_files_sent_before_are_the_senders(house: House) -> None:
    alice, bob = house.alice, house.bob
    weights = b"alice's weights"
    hex_ = hashlib.sha256(weights).hexdigest()
    blob = f"/v1/blobs/sha256:{hex_}"

    def register(tenant: Tenant) -> Any:
        body = {"name": "calf", "config": {}, "weights": f"sha256:{hex_}"}
        return tenant.ask("POST", "/v1/adapters?wait=30", json=body)

    assert alice.ask("PUT", blob, content=weights).status_code == 201
    assert register(alice).status_code == 201
    assert alice.ask("HEAD", blob).status_code == 200
    assert bob.ask("HEAD", blob).status_code == 404
    assert refusal(register(bob), 404)["code"] == "blob_not_found"
    assert bob.ask("PUT", blob, content=weights).status_code == 201, "new to bob"
    assert bob.ask("HEAD", blob).status_code == 200

    begin = {"bytes": 4, "sha256": "0" * 64}
    upload = f"/v1/uploads/{alice.ask('POST', '/v1/uploads', json=begin).json()['id']}"
    assert alice.ask("HEAD", upload).status_code == 200
    offset = {"Upload-Offset": "0"}
    for method, path in (("HEAD", ""), ("PATCH", ""), ("POST", "/complete"), ("DELETE", "")):
        key = bearer(bob.key) | offset
        answer = bob.server.http.request(method, upload + path, headers=key)
        assert answer.status_code == 404, (method, path)
    assert alice.ask("DELETE", upload).status_code < 300

    for name, status in (("calf", 404), ("common", 403), ("base", 403)):
        refusal(bob.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": name}), status)
    gone = alice.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "calf"})
    assert gone.status_code == 200
    assert eventually(lambda: "calf" not in alice.names())


def test_the_engine_hears_who_asked(house: House) -> None:
    house.alice.complete("base", n=2)
    house.bob.complete("base")

    def heard() -> list[str]:
        tenants: list[str] = house.operator.ask("GET", "/admin/state").json()["engine"]["tenants"]
        return tenants[-3:]

    assert eventually(lambda: heard() == ["alice", "alice", "bob"])


def test_labels_tell_tenants_apart(house: House) -> None:
    house.alice.upload("cow", b"alice's cow")
    house.bob.upload("cow", b"bob's cow")
    for tenant in (house.alice, house.bob):
        assert tenant.complete("cow").status_code == 200
    assert house.alice.complete("common").status_code == 200

    def labelled() -> bool:
        text = house.operator.ask("GET", "/metrics").text
        return all(f'adapter="{name}"' in text for name in ("alice/cow", "bob/cow", "common"))

    assert eventually(labelled)
    refusal(house.alice.ask("GET", "/metrics"), 403)
    for tenant in (house.alice, house.bob):
        tenant.delete("cow")


def test_no_name_reaches_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loramux")
    house.alice.upload("a-quiet-name", b"q")
    house.alice.upload("a-quiet-name", b"r", bad=["no"])
    house.alice.complete("a-quiet-name")
    house.alice.delete("a-quiet-name")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("loramux")]
    assert [line for line in lines if "a-quiet-name" in line or house.alice.key in line] == []


def test_names_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SERVER))
    config = configure(tmp_path, port=0)
    keys = {name: grant(config.keys_file, name) for name in ("alice", "bob")}
    digests = {}
    for run in range(2):
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        try:
            health = partial(server.http.get, "/health")
            assert eventually(lambda ask=health: ask().status_code == 200, within_s=30)
            for name, key in keys.items():
                tenant = Tenant(server, key)
                if run == 0:
                    digests[name] = tenant.upload("cat", name.encode()).json()["digest"]
                view = tenant.ask("GET", "/v1/adapters").json()["data"]
                assert [each["digest"] for each in view] == [digests[name]]
        finally:
            stop()
