"""Adapters for the draft and the small model over HTTP: the real front with scripted processes,
an engine that has both models, and two tenants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, PROMPT, SERVER, configure
from tests.http.conftest import serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, grant
from tests.http.test_bad_inputs import refusal

from loramux.front.front import Front

PROFILE = {"companions": {"draft": "swift", "small": "short"}}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tenant, Tenant]]:
    folder = tmp_path_factory.mktemp("companions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        partners = {"draft_model": folder / "tiny", "small_model": folder / "little"}
        config = configure(folder, port=0, **partners)
        keys = [grant(config.keys_file, name) for name in ("alice", "bob")]
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        alice, bob = (Tenant(server, key) for key in keys)
        for name, base in (("swift", "draft"), ("short", "small"), ("plain", "target")):
            assert upload(alice, name, base=base).status_code == 201
        for tenant in (alice, bob):
            assert upload(tenant, "cat", profile=json.dumps(PROFILE)).status_code == 201
        yield alice, bob
        stop()


@pytest.fixture
def alice(house: tuple[Tenant, Tenant]) -> Tenant:
    return house[0]


@pytest.fixture
def bob(house: tuple[Tenant, Tenant]) -> Tenant:
    return house[1]


def upload(tenant: Tenant, name: str, query: str = "?wait=30", **parts: Any) -> Any:
    files = {"config": b"{}", "weights": name.encode()}
    data = {"name": name, **parts}
    return tenant.ask("POST", "/v1/adapters" + query, data=data, files=files)


def register(tenant: Tenant, name: str, query: str = "?wait=30", **fields: Any) -> Any:
    """As JSON, of files sent before."""
    digests = {}
    for part, data in (("config", b"{}"), ("weights", name.encode())):
        digests[part] = "sha256:" + hashlib.sha256(data).hexdigest()
        tenant.ask("PUT", f"/v1/blobs/{digests[part]}", content=data)
    return tenant.ask("POST", "/v1/adapters" + query, json={"name": name, **digests, **fields})


def shown(tenant: Tenant, name: str) -> Any:
    return tenant.ask("GET", f"/v1/adapters/{name}").json()


def told(tenant: Tenant, answer: Any) -> dict[str, Any]:
    """The companions that the engine heard of for a completion."""
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = {}

    def heard() -> bool:
        engine = tenant.ask("GET", "/admin/state").json()["engine"]
        found.update(engine["companions"])
        return answer.json()["id"] + "-0" in found

    assert eventually(heard), "the state may be a quarter of a second old"
    companions: dict[str, Any] = found[answer.json()["id"] + "-0"]
    return companions


def test_both_ways_to_upload_say_the_model(alice: Tenant) -> None:
    assert (shown(alice, "swift")["base"], shown(alice, "plain")["base"]) == ("draft", "target")
    for base in ("draft", "small", "target"):
        answer = register(alice, f"json-{base}", base=base)
        assert answer.status_code == 201 and answer.json()["base"] == base, answer.text
        assert register(alice, f"json-{base}", base=base).status_code == 200
        assert upload(alice, f"json-{base}", base=base).status_code == 200, "the very same"
        seen = register(alice, "dry", "?validate_only=1", base=base).json()
        assert (seen["base"], seen["generation"]) == (base, 0)
    assert register(alice, "unsaid").json()["base"] == "target"


@pytest.mark.parametrize("send", [upload, register])
def test_a_base_that_is_none_is_named_and_nothing_stays(alice: Tenant, send: Any) -> None:
    before = alice.names()
    for base in ("", "Draft", "base", "drafts", "é", "target\n"):
        error = refusal(send(alice, "x", base=base))
        assert error["param"] == "base" and "target, draft, small" in error["message"]
    error = refusal(send(alice, "swift", "?expected_generation=1"), 409)
    assert (error["param"], error["code"]) == ("base", "name_reserved")
    profile = {"system": "x"} if send is register else '{"system":"x"}'
    assert refusal(send(alice, "x", base="draft", profile=profile))["param"] == "profile"
    assert alice.names() == before


@pytest.mark.parametrize("base", [None, 1, True, ["draft"], {"draft": 1}])
def test_a_base_of_another_type(alice: Tenant, base: Any) -> None:
    assert refusal(register(alice, "x", base=base))["param"] == "base"


def test_a_part_may_be_there_once_and_has_a_bound(alice: Tenant) -> None:
    assert refusal(upload(alice, "x", base=["draft", "draft"]))["param"] == "base"
    assert refusal(upload(alice, "x", base="d" * 65), 413)["param"] == "base"


def test_no_request_asks_for_one(alice: Tenant) -> None:
    for name, base in (("swift", "draft"), ("short", "small"), ("swift@1", "draft")):
        for fields in (
            {"model": name},
            {"model": "base", "adapter_id": name},
            {"model": "base", "adapters": [{"id": name}]},
            {"model": "base", "adapters": [{"id": "plain"}, {"id": name}]},
        ):
            error = refusal(alice.complete(**fields))
            assert f"is for the {base} model" in error["message"]
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"prompt": "x"}),
        ):
            refusal(alice.ask("POST", path, json={"model": name, **body}))
        refusal(alice.ask("GET", f"/v1/models/{name}"))
        sources = [{"id": "plain"}, {"id": name}]
        body = {"name": "mix", "blend": {"method": "soup", "sources": sources}}
        error = refusal(alice.ask("POST", "/v1/adapters", json=body))
        assert error["param"] == "blend.sources[1].id"
        targets = [{"model": "plain", "weight": 1}, {"model": name, "weight": 1}]
        error = refusal(alice.ask("PUT", "/v1/aliases/both", json={"targets": targets}))
        assert error["param"] == "targets[1].model"
    assert not {"swift", "short", "mix"} & set(alice.models())
    assert {"base", "cat", "plain"} <= set(alice.models())
    body = {"name": "mix", "base": "draft", "blend": {"method": "soup", "sources": [{"id": "cat"}]}}
    assert refusal(alice.ask("POST", "/v1/adapters", json=body))["param"] == "base"
    assert refusal(alice.ask("PUT", "/v1/adapters/swift/pin"))["param"] == "name"


def test_one_adapter_brings_its_companions(alice: Tenant, bob: Tenant) -> None:
    digests = {name: shown(alice, name)["digest"] for name in ("swift", "short")}
    assert shown(alice, "cat")["companions"] == {
        "draft": {"name": "swift", "status": "ready", "digest": digests["swift"]},
        "small": {"name": "short", "status": "ready", "digest": digests["short"]},
    }
    listed = {view["name"]: view for view in alice.ask("GET", "/v1/adapters").json()["data"]}
    assert listed["cat"]["companions"] == shown(alice, "cat")["companions"]
    assert listed["plain"]["companions"] == {}
    wanted = {"1": [[digests["swift"], 1.0]], "2": [[digests["short"], 1.0]]}
    one, other = {"id": "cat", "scale": 0.5}, {"id": "plain"}
    for fields in (
        {"model": "cat"},
        {"model": "cat@1", "scale": 0.25},
        {"model": "base", "adapter_id": "cat"},
        {"model": "base", "adapters": [one]},
    ):
        assert told(alice, alice.complete(**fields)) == wanted
    for fields in ({"adapters": [one, other]}, {"adapters": [other, one]}, {}):
        assert told(alice, alice.complete(model="base", **fields)) == {}
    chat = {"model": "cat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert told(alice, alice.ask("POST", "/v1/chat/completions", json=chat)) == wanted
    # Bob's cat has a profile that names the same; what alice has is nothing to him.
    missing = {"status": "missing", "digest": None}
    assert shown(bob, "cat")["companions"] == {
        "draft": {"name": "swift", **missing},
        "small": {"name": "short", **missing},
    }
    assert told(bob, bob.complete("cat", prompt=PROMPT)) == {}
    assert bob.ask("GET", "/v1/adapters/swift").status_code == 404


def test_the_schema_names_the_field(alice: Tenant) -> None:
    path = alice.ask("GET", "/openapi.json").json()["paths"]["/v1/adapters"]["post"]
    for body in path["requestBody"]["content"].values():
        base = body["schema"]["properties"]["base"]
        assert base["enum"] == ["target", "draft", "small"] and base["default"] == "target"
