"""Names that stand for adapters, over HTTP and the real front with scripted processes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import PROMPT
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import real_server

from loramux.adapters.aliases import AliasRow, Target


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with real_server(tmp_path_factory.mktemp("aliases"), max_num_seqs=64) as server:
        for number in range(3):
            upload(server, "cat", b"cat %d" % number, f"&expected_generation={number}")
        upload(server, "dog", b"dog")
        yield server


def upload(server: Running, name: str, weights: bytes, query: str = "", status: int = 201) -> Any:
    files = {"config": b"{}", "weights": weights}
    answer = server.http.post(f"/v1/adapters?wait=30{query}", data={"name": name}, files=files)
    assert answer.status_code == status, answer.text
    return answer.json()


def put(server: Running, alias: str, *targets: Any, **fields: Any) -> Any:
    """One target as it is, or several as (model, weight)."""
    body = {"target": targets[0]} if targets else {}
    if targets and not isinstance(targets[0], str):
        body = {"targets": [{"model": model, "weight": weight} for model, weight in targets]}
    return server.http.put(f"/v1/aliases/{alias}", json={**body, **fields})


def digest(server: Running, model: str) -> str:
    return str(server.http.get(f"/v1/adapters/{model}").json()["digest"])


def served(server: Running, model: str, **fields: Any) -> tuple[str, str]:
    answer = server.complete(PROMPT, model=model, max_tokens=1, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.headers["x-loramux-adapter"], answer.headers["x-loramux-model"]


def test_the_life_of_an_alias(real: Running) -> None:
    answer = put(real, "prod", "cat@2", expected_revision=0)
    assert answer.status_code == 201
    view = answer.json()
    assert (view["id"], view["object"], view["revision"]) == ("prod", "alias", 1)
    assert view["targets"] == [
        {
            "model": "cat@2",
            "weight": 1,
            "follows": False,
            "digest": digest(real, "cat@2"),
            "status": "ready",
        }
    ]
    again = put(real, "prod", f"cat@sha256:{digest(real, 'cat@2')[:12]}")
    assert (again.status_code, again.json()) == (200, view), "the same is no new revision"
    assert real.http.get("/v1/aliases/prod").json() == view
    assert served(real, "prod") == (digest(real, "cat@2"), "cat@2")
    assert served(real, "cat") == (digest(real, "cat@3"), "cat@3")
    error = refusal(put(real, "prod", "cat@1", expected_revision=0), 409)
    assert (error["code"], error["param"]) == ("revision_conflict", "expected_revision")
    answer = put(real, "prod", "dog", expected_revision=1)
    assert answer.status_code == 200 and answer.json()["revision"] == 2
    assert answer.json()["targets"][0]["follows"] is True
    assert served(real, "prod") == (digest(real, "dog"), "dog@1")
    listed = real.http.get("/v1/aliases").json()
    assert listed == {"object": "list", "data": [answer.json()]}
    assert real.http.delete("/v1/aliases/prod").status_code == 200
    for gone in (
        real.http.get("/v1/aliases/prod"),
        real.http.delete("/v1/aliases/prod"),
        real.complete(PROMPT, model="prod"),
    ):
        refusal(gone, 404)
    assert put(real, "prod", "cat", expected_revision=0).json()["revision"] == 4
    assert real.http.delete("/v1/aliases/prod").json()["targets"] == []


def test_a_bare_name_follows_and_a_version_stays(real: Running) -> None:
    upload(real, "pup", b"one")
    put(real, "newest", "pup")
    put(real, "fixed", "pup@1")
    two = upload(real, "pup", b"two", "&expected_generation=1")
    assert served(real, "newest") == (two["digest"], "pup@2")
    assert served(real, "fixed")[1] == "pup@1"
    for path in ("pup", "pup@1", "pup@2"):
        error = refusal(real.http.delete(f"/v1/adapters/{path}"), 409)
        assert error["code"] == "adapter_aliased"
        assert ("fixed" in error["message"]) == (path != "pup@2")
        assert ("newest" in error["message"]) == (path != "pup@1")
    assert put(real, "newest", "pup@1").status_code == 200, "roll-back"
    assert real.http.delete("/v1/adapters/pup@2").json()["id"] == "pup@2"
    assert served(real, "newest")[1] == served(real, "pup")[1] == "pup@1"
    error = refusal(real.complete(PROMPT, model="pup@2"), 404)
    assert error["code"] in ("model_not_found", "generation_gone")
    for alias in ("newest", "fixed"):
        real.http.delete(f"/v1/aliases/{alias}")
    assert real.http.delete("/v1/adapters/pup").status_code == 202
    refusal(real.http.get("/v1/adapters/pup/versions"), 404)


def test_every_generation_is_listed(real: Running) -> None:
    listed = real.http.get("/v1/adapters/cat/versions").json()
    assert listed["object"] == "list"
    assert [view["id"] for view in listed["data"]] == ["cat@3", "cat@2", "cat@1"]
    assert listed["data"] == [
        real.http.get(f"/v1/adapters/{v['id']}").json() for v in listed["data"]
    ]
    refusal(real.http.get("/v1/adapters/nobody/versions"), 404)
    refusal(real.http.get("/v1/adapters/base/versions"), 404)


def test_cards(real: Running) -> None:
    put(real, "prod", ("cat@1", 9), ("base", 1))
    cards = {card["id"]: card for card in real.http.get("/v1/models").json()["data"]}
    assert list(cards) == ["base", "cat", "dog", "prod"]
    assert {**cards["prod"], "id": "cat", "created": 0} == {**cards["cat"], "created": 0}
    assert real.http.get("/v1/models/prod").json() == cards["prod"]
    assert cards["prod"]["root"] == cards["prod"]["parent"] == "base"
    assert [view["name"] for view in real.http.get("/v1/adapters").json()["data"]] == ["cat", "dog"]
    refusal(real.http.get("/v1/adapters/prod"), 404)
    real.http.delete("/v1/aliases/prod")


def test_a_share_for_the_base(real: Running) -> None:
    put(real, "prod", ("cat@1", 1), ("base", 1))
    both = {("base", "base"), (digest(real, "cat@1"), "cat@1")}
    by_user = {user: served(real, "prod", user=user) for user in map(str, range(20))}
    assert set(by_user.values()) == both
    for user, first in by_user.items():
        assert served(real, "prod", user=user) == first
        scaled = real.complete(PROMPT, model="prod", user=user, scale=0.5, max_tokens=1)
        worn = real.complete(PROMPT, adapters=[{"id": "prod"}, {"id": "dog"}], user=user)
        for answer in (scaled, worn):
            assert answer.status_code == 200, answer.text
        assert scaled.headers["x-loramux-model"] == first[1]
        versions = worn.headers["x-loramux-model"]
        assert versions == ("dog@1" if first[1] == "base" else "cat@1, dog@1")
        assert worn.json()["model"] == "base"
    drawn = Counter(served(real, "prod") for _ in range(30))
    assert set(drawn) == both, "without a user each request is drawn anew"
    for user in by_user:
        error = refusal(real.complete(PROMPT, model="prod", adapters=[{"id": "dog"}], user=user))
        assert error["param"] == "model", "an alias is no base, whatever it stands for"
    real.http.delete("/v1/aliases/prod")


def test_a_chat_streamed_under_an_alias(start: Start) -> None:
    server = start()
    catalog = server.front.adapters.catalog
    targets = (Target(name="shout", generation=2, digest="x", weight=5), Target(weight=5))
    alias = AliasRow(tenant="", name="prod", revision=1, targets=targets, changed=0.0)
    catalog.put_alias("prod", alias)
    seen = set()
    for user in map(str, range(12)):
        whole = server.chat(model="prod", user=user)
        stream = server.chat(model="prod", user=user, stream=True)
        assert whole.json()["model"] == "prod" and '"model":"prod"' in stream.text
        assert whole.headers["x-loramux-model"] == stream.headers["x-loramux-model"]
        seen.add(stream.headers["x-loramux-model"])
    assert seen == {"shout@2", "base"}
    catalog.put_alias("prod", None)
    refusal(server.chat(model="prod"), 404)


def test_one_target_for_a_whole_request(real: Running) -> None:
    """Eight choices of four prompts of one request on halves: by chance they are of one kind once
    in 2**31 times."""
    put(real, "prod", ("cat@1", 1), ("cat@2", 1))
    seen = real.front.snapshot.adapter_tokens  # type: ignore[attr-defined]
    before = {key: list(value) for key, value in seen.items()}
    answer = real.complete([PROMPT] * 4, model="prod", n=8, max_tokens=1)
    worked = {key for key, value in seen.items() if value != before.get(key)}
    assert worked == {answer.headers["x-loramux-adapter"]}
    real.http.delete("/v1/aliases/prod")


def test_a_swap_while_requests_come(real: Running) -> None:
    """Each of 200 gets one version wholly, and those after the last answer get the last one."""
    versions = {digest(real, f"cat@{number}"): f"cat@{number}" for number in (1, 2)}
    put(real, "prod", "cat@1")
    over = threading.Event()

    def swap() -> int:
        revision = 1
        while not over.is_set():
            target = f"cat@{1 + revision % 2}"
            answer = put(real, "prod", target)
            assert answer.status_code == 200
            assert answer.json()["targets"][0]["model"] == target
            revision += 1
        return revision

    def ask(_: int) -> str:
        adapter, version = served(real, "prod")
        assert versions[adapter] == version
        return version

    with ThreadPoolExecutor(9) as pool:
        swaps = pool.submit(swap)
        try:
            got = Counter(pool.map(ask, range(200)))
        finally:
            over.set()
        assert swaps.result(30) > 5 and set(got) == {"cat@1", "cat@2"}
        put(real, "prod", "cat@2")
        assert set(pool.map(ask, range(20))) == {"cat@2"}
    real.http.delete("/v1/aliases/prod")


def test_what_began_goes_on(real: Running) -> None:
    upload(real, "old", b"old")
    put(real, "prod", "old@1")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            real.complete, PROMPT, model="prod", max_tokens=60, cache_salt="delay=0.01"
        )
        assert eventually(lambda: real.front.snapshot.unfinished == 1)  # type: ignore[attr-defined]
        gone = digest(real, "old")
        put(real, "prod", "dog@1")
        assert real.http.delete("/v1/adapters/old").status_code == 202
        assert served(real, "prod")[1] == "dog@1"
        answer = running.result(30)
    assert answer.headers["x-loramux-adapter"] == gone
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert eventually(lambda: told(real, "evict", gone)), "its last request has ended"
    real.http.delete("/v1/aliases/prod")


def told(server: Running, kind: str, digest: str) -> bool:
    return [kind, digest] in server.http.get("/admin/state").json()["engine"]["commands"]


NO_NAMES = ["a b", "-a", "a@1", "x" * 97, "é"]
BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "target"),
    ({"target": "cat", "targets": []}, "target"),
    ({"target": None}, "target"),
    ({"target": 5}, "target"),
    ({"target": ["cat"]}, "target"),
    ({"target": "cat", "weight": 1}, None),
    ({"target": "cat", "expected_revision": True}, "expected_revision"),
    ({"target": "cat", "expected_revision": -1}, "expected_revision"),
    ({"target": "cat", "expected_revision": 1.0}, "expected_revision"),
    ({"targets": {}}, "targets"),
    ({"targets": []}, "targets"),
    ({"targets": [{"model": "cat", "weight": 1}] * 17}, "targets"),
    ({"targets": ["cat"]}, "targets[0]"),
    ({"targets": [{"model": "cat"}]}, "targets[0]"),
    ({"targets": [{"model": "cat", "weight": 1, "x": 1}]}, "targets[0]"),
    *(
        ({"targets": [{"model": "cat", "weight": weight}]}, "targets[0].weight")
        for weight in (0, -1, 1.5, True, "1", None, 1_000_001)
    ),
    ({"targets": [{"model": 1, "weight": 1}]}, "targets[0].model"),
    (
        {"targets": [{"model": "dog", "weight": 1}, {"model": "dog", "weight": 2}]},
        "targets[1].model",
    ),
    (
        {"targets": [{"model": "base", "weight": 1}, {"model": "base", "weight": 1}]},
        "targets[1].model",
    ),
    ({"target": "there"}, "target"),
    ({"target": "ghost"}, "target"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bodies_that_are_none(real: Running, body: dict[str, Any], param: str | None) -> None:
    put(real, "there", "cat")
    assert refusal(real.http.put("/v1/aliases/ghost", json=body))["param"] == param
    refusal(real.http.get("/v1/aliases/ghost"), 404)


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_none(real: Running, name: str) -> None:
    assert refusal(put(real, name, "cat"))["param"] == "alias"
    refusal(real.http.get(f"/v1/aliases/{name}"), 404)
    refusal(real.http.delete(f"/v1/aliases/{name}"), 404)


def test_targets_that_are_not_there(real: Running) -> None:
    for model, code in (
        ("nobody", "model_not_found"),
        ("cat@9", "model_not_found"),
        ("base@1", "model_not_found"),
        ("cat@sha256:" + "0" * 64, "model_not_found"),
    ):
        error = refusal(put(real, "ghost", ("cat@1", 1), (model, 1)), 404)
        assert (error["code"], error["param"]) == (code, "targets[1].model")
        assert refusal(put(real, "ghost", model), 404)["param"] == "target"
    files = {"config": b'{"wait": 1}', "weights": b"slow"}
    real.http.post("/v1/adapters", data={"name": "slow"}, files=files)
    error = refusal(put(real, "ghost", ("cat@1", 1), ("slow", 1)), 409)
    assert (error["code"], error["param"]) == ("adapter_not_ready", "targets[1].model")
    real.http.delete("/v1/adapters/slow")
    refusal(real.http.get("/v1/aliases/ghost"), 404)


def test_names_that_are_taken(real: Running) -> None:
    for name in ("cat", "base"):
        assert refusal(put(real, name, "dog"), 409)["code"] == "name_reserved"
    put(real, "prod", "dog")
    files = {"config": b"{}", "weights": b"x"}
    answer = real.http.post("/v1/adapters?wait=9", data={"name": "prod"}, files=files)
    error = refusal(answer, 409)
    assert (error["code"], error["param"]) == ("name_reserved", "name")
    real.http.delete("/v1/aliases/prod")
    upload(real, "prod", b"x")
    assert refusal(put(real, "prod", "dog"), 409)["code"] == "name_reserved"
    real.http.delete("/v1/adapters/prod")


def test_the_metrics_speak_of_adapters(real: Running) -> None:
    put(real, "newest", ("dog", 1))
    served(real, "newest")
    text = real.http.get("/metrics").text
    assert 'adapter="dog"' in text and '"newest"' not in text
    real.http.delete("/v1/aliases/newest")


def test_user_is_a_string(real: Running) -> None:
    for user in (5, True, ["a"], {}):
        assert refusal(real.complete(PROMPT, user=user))["param"] == "user"
    assert real.complete(PROMPT, user=None).status_code == 200


def test_aliases_survive_a_restart(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        upload(server, "cat", b"1")
        upload(server, "cat", b"2", "&expected_generation=1")
        put(server, "prod", ("cat@1", 3), ("base", 1))
        put(server, "prod", ("cat@1", 3), ("cat", 1))
        put(server, "gone", "cat")
        server.http.delete("/v1/aliases/gone")
        before = server.http.get("/v1/aliases").json()
        users = {user: served(server, "prod", user=user) for user in map(str, range(9))}
        assert len(set(users.values())) == 2
    with real_server(tmp_path) as server:
        assert server.http.get("/v1/aliases").json() == before
        assert {user: served(server, "prod", user=user) for user in users} == users
        refusal(server.http.delete("/v1/adapters/cat@1"), 409)
