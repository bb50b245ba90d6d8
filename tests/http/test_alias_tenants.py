"""Aliases of two tenants of one server, and the shared ones that both see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.front.house import ENGINE, INGEST, SERVER, configure
from tests.http.conftest import serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, grant
from tests.http.test_bad_inputs import refusal
from tests.http.test_tenants import House

from loramux.front.front import Front


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """``common`` is shared, and so are the aliases ``stable`` (to common@1) and ``mixed``, which
    were made before there were keys."""
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "common").mkdir()
    (folder / "common" / "adapter_config.json").write_text("{}")
    (folder / "common" / "adapter_model.safetensors").write_bytes(b"common")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(folder, port=0, adapter=(f"common={folder / 'common'}",))
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        targets = [{"model": "common", "weight": 1}, {"model": "base", "weight": 1}]
        for name, body in (("stable", {"target": "common@1"}), ("mixed", {"targets": targets})):
            assert server.http.put(f"/v1/aliases/{name}", json=body).status_code == 201
        stop()
        keys = [
            grant(config.keys_file, "alice", "infer", "upload"),
            grant(config.keys_file, "bob", "infer", "upload"),
            grant(config.keys_file, "operator"),
        ]
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        health = {"authorization": f"Bearer {keys[2]}"}
        assert eventually(
            lambda: server.http.get("/health", headers=health).status_code == 200, within_s=30
        )
        yield House(*(Tenant(server, key) for key in keys))
        stop()


def put(tenant: Tenant, alias: str, target: str, **fields: Any) -> Any:
    return tenant.ask("PUT", f"/v1/aliases/{alias}", json={"target": target, **fields})


def names(tenant: Tenant) -> list[str]:
    return [view["id"] for view in tenant.ask("GET", "/v1/aliases").json()["data"]]


def version(tenant: Tenant, model: str, **fields: Any) -> str:
    answer = tenant.complete(model, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-loramux-model"])


def test_one_alias_two_tenants(house: House) -> None:
    alice, bob = house.alice, house.bob
    one, two = alice.upload("cat", b"one").json(), bob.upload("cat", b"two").json()
    for tenant in (alice, bob):
        answer = put(tenant, "prod", "cat@1", expected_revision=0)
        assert (answer.status_code, answer.json()["revision"]) == (201, 1)
    put(alice, "prod", "common")
    put(alice, "prod", "cat")
    assert alice.ask("GET", "/v1/aliases/prod").json()["revision"] == 3
    assert bob.ask("GET", "/v1/aliases/prod").json()["revision"] == 1
    for tenant, view in ((alice, one), (bob, two)):
        assert tenant.complete("prod").headers["x-loramux-adapter"] == view["digest"]
    assert alice.ask("DELETE", "/v1/aliases/prod").status_code == 200
    refusal(alice.complete("prod"), 404)
    alice.delete("cat")
    refusal(bob.ask("DELETE", "/v1/adapters/cat"), 409)
    assert bob.complete("prod").headers["x-loramux-adapter"] == two["digest"]
    bob.ask("DELETE", "/v1/aliases/prod")
    bob.delete("cat")


def everything(tenant: Tenant, name: str) -> list[tuple[int, str]]:
    """Every answer that could tell whether an alias exists, with its name taken out."""
    answers = [
        tenant.complete(name),
        tenant.complete(f"{name}@1"),
        tenant.complete("base", adapter_id=name),
        tenant.complete("base", adapters=[{"id": name}]),
        tenant.ask("GET", f"/v1/models/{name}"),
        tenant.ask("GET", f"/v1/aliases/{name}"),
        tenant.ask("GET", f"/v1/adapters/{name}"),
        tenant.ask("GET", f"/v1/adapters/{name}/versions"),
        tenant.ask("PUT", f"/v1/adapters/{name}/ttl", json={"ttl_s": 1}),
        tenant.ask("DELETE", f"/v1/aliases/{name}"),
        tenant.ask("DELETE", f"/v1/adapters/{name}"),
        tenant.ask("DELETE", f"/v1/adapters/{name}@1"),
        tenant.ask("PUT", f"/v1/adapters/{name}/pin"),
        put(tenant, "probe", name),
        put(tenant, name, "base", expected_revision=1),
    ]
    return [(answer.status_code, answer.text.replace(name, "NAME")) for answer in answers]


def test_another_tenants_alias_is_a_name_that_never_was(house: House) -> None:
    house.alice.upload("cat", b"one")
    assert put(house.alice, "secret", "cat").status_code == 201
    seen = everything(house.bob, "secret")
    assert seen == everything(house.bob, "never-there")
    assert {status for status, _ in seen} == {404, 409}
    assert "secret" not in names(house.bob) + house.bob.models() + names(house.operator)
    assert "secret" in names(house.alice) and "secret" in house.alice.models()
    house.alice.ask("DELETE", "/v1/aliases/secret")
    assert everything(house.alice, "secret")[:-1] == everything(house.alice, "never-there")[:-1]
    house.alice.delete("cat")


def test_shared_aliases(house: House) -> None:
    alice, bob, operator = house.alice, house.bob, house.operator
    for tenant in (alice, bob, operator):
        assert names(tenant) == ["mixed", "stable"]
        assert {"mixed", "stable"} <= set(tenant.models())
        assert version(tenant, "stable") == "common@1"
    users = list(map(str, range(40)))
    by_tenant = [[version(t, "mixed", user=user) for user in users] for t in (alice, bob)]
    assert by_tenant[0] != by_tenant[1], "a user of one tenant is another's stranger"
    error = refusal(alice.ask("DELETE", "/v1/aliases/stable"), 403)
    assert error["code"] == "insufficient_scope"
    error = refusal(operator.ask("DELETE", "/v1/adapters/common@1"), 409)
    assert "(mixed, stable)" in error["message"]
    answer = put(operator, "stable", "base", expected_revision=1)
    assert answer.status_code == 200, "an operator moves the shared one"
    assert version(bob, "stable") == "base"
    assert put(operator, "stable", "common@1").json()["revision"] == 3


def test_an_alias_of_ones_own_in_front_of_what_is_shared(house: House) -> None:
    alice, bob = house.alice, house.bob
    cat = alice.upload("cat", b"one").json()["id"]
    for name in ("stable", "common"):
        answer = put(alice, name, cat, expected_revision=0)
        assert (answer.status_code, answer.json()["revision"]) == (201, 1)
        assert version(alice, name) == cat and version(bob, name) == "common@1"
        assert alice.models().count(name) == 1
    assert version(alice, "common@1") == "common@1", "a version is an adapter's"
    assert put(alice, "common", "common@1").status_code == 200, "a version to stay with"
    assert put(alice, "common", "common@1").status_code == 200
    assert version(alice, "common") == "common@1"
    error = refusal(put(alice, "common", "common"))
    assert error["param"] == "target"
    for name in ("stable", "common"):
        assert alice.ask("DELETE", f"/v1/aliases/{name}").status_code == 200
        assert version(alice, name) == "common@1"
    alice.delete("cat")


def test_an_adapter_of_ones_own_in_front_of_a_shared_alias(house: House) -> None:
    alice = house.alice
    put(alice, "follows", "common")
    for name in ("stable", "common"):
        assert alice.upload(name, b"mine").status_code == 201
        assert version(alice, name) == f"{name}@1"
    own = alice.ask("GET", "/v1/adapters/common").json()["digest"]
    assert alice.complete("follows").headers["x-loramux-adapter"] != own, "it was the shared one"
    assert names(alice) == ["follows", "mixed"] and names(house.bob) == ["mixed", "stable"]
    for name in ("stable", "common"):
        alice.delete(name)
    assert names(alice) == ["follows", "mixed", "stable"]
    alice.ask("DELETE", "/v1/aliases/follows")


def test_a_tenants_alias_does_not_hold_what_is_shared(house: House) -> None:
    """Last: afterwards ``common`` has gone."""
    alice, operator = house.alice, house.operator
    put(alice, "mine", "common@1")
    put(alice, "newest", "common")
    error = refusal(operator.ask("DELETE", "/v1/adapters/common"), 409)
    assert "mine" not in error["message"]
    for name in ("stable", "mixed"):
        assert operator.ask("DELETE", f"/v1/aliases/{name}").status_code == 200
    assert operator.ask("DELETE", "/v1/adapters/common").status_code == 202
    for name in ("mine", "newest"):
        error = refusal(alice.complete(name), 404)
        assert error["code"] == "generation_gone" and name in error["message"]
        (target,) = alice.ask("GET", f"/v1/aliases/{name}").json()["targets"]
        assert (target["status"], target["digest"]) == ("gone", None)
        assert name not in alice.models()
        assert put(alice, name, "base").status_code == 200
        assert version(alice, name) == "base"
