"""Medusa heads on their way in, and to the requests that wear their adapter: HTTP, the front and
the real ingest process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.adapters.peft_files import make_config, make_tensors, safetensors_bytes
from tests.front.fake_engine import ready
from tests.front.house import PROMPT
from tests.front.uploading import blobs as stored
from tests.heads import saying
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.granting import bearer, client, grant
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import put, real_server, sha

from loramux.adapters.blobs import adapter_digest
from loramux.front.front import INGEST
from loramux.front.keys import Limits, editing

HIDDEN, VOCAB = 16, 320
CONFIG = json.dumps(make_config()).encode()
WEIGHTS = safetensors_bytes(make_tensors(ready(1).base))
HEADS = saying(5, HIDDEN, VOCAB)
OTHERS = saying(6, HIDDEN, VOCAB, heads=2)
PROFILE = b'{"system":"x"}'
DRAFTERS = ["lookup", "suffix"]
"""What the scripted engine has for every request."""

running = partial(real_server, ingest=INGEST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with running(folder) as server:
        yield server


def upload(
    server: Running, name: str, heads: bytes | None = None, query: str = "?wait=60", **parts: bytes
) -> httpx.Response:
    files = {"config": CONFIG, "weights": WEIGHTS, **parts}
    if heads is not None:
        files["heads"] = heads
    return server.http.post("/v1/adapters" + query, data={"name": name}, files=files)


def shown(server: Running, name: str) -> Any:
    return server.http.get(f"/v1/adapters/{name}").json()


def listed(server: Running) -> set[str]:
    return {view["name"] for view in server.http.get("/v1/adapters").json()["data"]}


def evicted(server: Running, digest: str) -> bool:
    """Whether the engine was told to forget it."""
    return ["evict", digest] in server.http.get("/admin/state").json()["engine"]["commands"]


def told(server: Running, **fields: Any) -> Any:
    """The speculation of an answer's usage."""
    answer = server.complete(PROMPT, max_tokens=2, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["details"]["speculation"]


def test_other_heads_are_another_version(real: Running, folder: Path) -> None:
    plain = upload(real, "plain").json()
    guessed = upload(real, "guessed", HEADS)
    assert guessed.status_code == 201, guessed.text
    made = guessed.json()
    assert made["digest"] == adapter_digest(sha(CONFIG), sha(WEIGHTS), "", sha(HEADS))
    assert made["heads_digest"] == sha(HEADS) and plain["heads_digest"] == ""
    assert made["report"].pop("heads") == {"heads": 3, "num_bytes": len(HEADS)}
    assert made["report"] == plain["report"], "the same weights else"
    assert shown(real, "guessed")["report"]["heads"]["heads"] == 3
    assert {sha(CONFIG), sha(WEIGHTS), sha(HEADS)} <= stored(folder)
    assert upload(real, "guessed", HEADS).status_code == 200, "just this is there"
    for other in (None, OTHERS):
        assert refusal(upload(real, "guessed", other), 409)["code"] == "generation_conflict"
    answer = upload(real, "guessed", OTHERS, "?wait=60&expected_generation=1").json()
    assert (answer["generation"], answer["heads_digest"]) == (2, sha(OTHERS))
    both = upload(real, "both", HEADS, profile=PROFILE).json()
    assert both["digest"] == adapter_digest(sha(CONFIG), sha(WEIGHTS), sha(PROFILE), sha(HEADS))
    assert len({plain["digest"], made["digest"], answer["digest"], both["digest"]}) == 4


def test_requests_are_guessed_by_the_heads_of_what_they_wear(real: Running) -> None:
    for name, heads in (("none", None), ("one", HEADS), ("two", OTHERS)):
        assert upload(real, name, heads).status_code in (200, 201)
    asked = {"drafters": ["medusa"]}
    assert told(real, model="one", speculation=asked)["heads"] == sha(HEADS)
    assert told(real, model="two@1", speculation=asked)["heads"] == sha(OTHERS)
    auto = told(real, model="one")
    assert auto["drafters"] == [*DRAFTERS, "medusa"] and auto["heads"] == sha(HEADS)
    scaled = told(real, adapters=[{"id": "one", "scale": 0.5}, {"id": "none"}], speculation=asked)
    assert scaled["heads"] == sha(HEADS), "the only ones there are"
    typical = {"drafters": ["medusa"], "acceptance": "typical"}
    assert told(real, model="one", speculation=typical)["acceptance"] == "typical"
    for fields in (
        {"model": "none"},
        {"model": "base"},
        {"adapters": [{"id": "one"}, {"id": "two"}]},
    ):
        error = refusal(real.complete(PROMPT, speculation=asked, **fields))
        assert error["param"] == "speculation.drafters[0]"
        assert error["message"].endswith("there are: lookup, suffix")
        auto = told(real, **fields)
        assert auto["drafters"] == DRAFTERS and "heads" not in auto
    assert "heads" not in told(real, model="one", speculation={"drafters": ["lookup"]})


Z = torch.zeros
BAD: dict[str, tuple[bytes, list[str]]] = {
    "empty": (
        safetensors_bytes({"accuracy": Z(1, 1).numpy()}),
        ["the file holds no Medusa heads", "tensor accuracy: shape"],
    ),
    "no file of tensors": (b"PK\x03\x04 and so on", ["not safetensors"]),
    "nothing": (b"", ["too short"]),
    "another base": (
        saying(5, HIDDEN + 1, VOCAB - 1, heads=1),
        [
            "0.0.linear.weight: shape [17, 17], for this base it is [16, 16]",
            "0.0.linear.bias: shape [17]",
            "0.1.weight: shape [319, 17], for this base it is [320, 16]",
        ],
    ),
    "values": (
        saying(5, HIDDEN, VOCAB, heads=1, **{"0.0.linear.bias": torch.full((HIDDEN,), torch.nan)}),
        ["0.0.linear.bias holds a value that is not finite"],
    ),
    "unknown": (
        saying(5, HIDDEN, VOCAB, heads=1, extra=Z(2), accuracy=Z(1, 2) + 1.5),
        ["'extra': not a part of Medusa heads", "tensor accuracy holds a value"],
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("query", ["?wait=60", "?validate_only=1"])
def test_bad_heads_are_refused_with_all_offenders(
    real: Running, folder: Path, name: str, query: str
) -> None:
    assert upload(real, "stays").status_code in (200, 201)
    before = stored(folder)
    heads, said = BAD[name]
    error = refusal(upload(real, "bad", heads, query), 422)
    assert len(error["problems"]) == len(said)
    assert all(problem.startswith("heads: ") for problem in error["problems"])
    for text in said:
        assert any(text in problem for problem in error["problems"]), text
    assert eventually(lambda: stored(folder) == before), "its files are gone"
    if "wait" in query:
        assert refusal(real.complete(PROMPT, model="bad"), 409)["code"] == "adapter_failed"
        assert real.http.delete("/v1/adapters/bad").status_code == 202
    assert eventually(lambda: "bad" not in listed(real))


def test_all_that_is_wrong_anywhere_is_listed(real: Running) -> None:
    config = json.dumps(make_config(use_dora=True, r=0)).encode()
    heads, _ = BAD["another base"]
    error = refusal(upload(real, "worse", heads, config=config, profile=b'{"x":1}'), 422)
    assert error["problems"][-4].startswith("profile.x")
    assert all(problem.startswith("heads: ") for problem in error["problems"][-3:])
    assert any("r=0" in problem or "use_dora" in problem for problem in error["problems"])


def test_as_json_by_their_digest(real: Running) -> None:
    files = {"weights": f"sha256:{sha(WEIGHTS)}", "config": f"sha256:{sha(CONFIG)}"}
    for data in (CONFIG, WEIGHTS, HEADS):
        put(real, data)

    def register(name: str, **fields: Any) -> httpx.Response:
        return real.http.post("/v1/adapters?wait=60", json={"name": name, **files, **fields})

    named = register("named", heads=f"sha256:{sha(HEADS)}")
    assert named.status_code == 201, named.text
    assert named.json()["digest"] == upload(real, "sent", HEADS).json()["digest"]
    assert register("bare", heads=None).json()["heads_digest"] == ""
    missing = refusal(register("a", heads=f"sha256:{'0' * 64}"), 404)
    assert (missing["code"], missing["param"]) == ("blob_not_found", "heads")
    for wrong in ("", 5, [], {}, False, f"sha256:{'0' * 63}"):
        error = refusal(register("a", heads=wrong))
        assert (error["code"], error["param"]) == ("digest_malformed", "heads")
    blend = {"method": "soup", "sources": [{"id": "named"}]}
    for fields, digest in (({}, ""), ({"heads": f"sha256:{sha(OTHERS)}"}, sha(OTHERS))):
        put(real, OTHERS)
        body = {"name": f"blend-{digest[:4]}", "blend": blend, **fields}
        made = real.http.post("/v1/adapters?wait=60", json=body)
        assert made.status_code == 201, made.text
        assert made.json()["heads_digest"] == digest, "a blend inherits none"


def test_twice_or_for_another_model(real: Running, folder: Path) -> None:
    before = stored(folder)
    files = [("config", CONFIG), ("weights", WEIGHTS), ("heads", HEADS), ("heads", OTHERS)]
    body = [(name, ("f", data)) for name, data in files]
    twice = real.http.post("/v1/adapters", data={"name": "a"}, files=body)
    assert refusal(twice)["param"] == "heads"
    assert eventually(lambda: stored(folder) == before)


def test_a_companion_has_none(tmp_path: Path) -> None:
    with running(tmp_path, draft_model=tmp_path / "draft") as server:
        parts = {"base": b"draft"}
        error = refusal(upload(server, "swift", HEADS, **parts))
        assert (error["param"], "draft model" in error["message"]) == ("heads", True)
        assert eventually(lambda: not stored(tmp_path))


def test_they_are_no_larger_than_allowed(tmp_path: Path) -> None:
    limit = 400_000
    with running(tmp_path, max_adapter_file_bytes=limit) as server:
        error = refusal(upload(server, "large", b"x" * (limit + 1)), 413)
        assert error["param"] == "heads" and str(limit) in error["message"]
        assert eventually(lambda: not stored(tmp_path))
        both = upload(server, "fits", b"x" * limit, weights=b"x" * limit)
        assert refusal(both, 422)["code"] == "adapter_invalid", "they were read"
        assert upload(server, "small", HEADS).status_code == 201


def test_one_the_server_would_not_keep_is_refused_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.config.HEADS_BYTES", len(HEADS) - 1)
    with running(tmp_path) as server:
        for data in (CONFIG, WEIGHTS, HEADS):
            assert put(server, data).status_code == 201
        body = {"name": "a", "heads": f"sha256:{sha(HEADS)}"}
        body |= {"config": f"sha256:{sha(CONFIG)}", "weights": f"sha256:{sha(WEIGHTS)}"}
        error = refusal(server.http.post("/v1/adapters", json=body), 413)
        assert error["param"] == "heads"


def test_deleting_takes_them_and_tells_the_engine(real: Running, folder: Path) -> None:
    heads = saying(7, HIDDEN, VOCAB)
    assert upload(real, "goes", heads).status_code == 201
    assert upload(real, "goes-too", heads, profile=PROFILE).status_code == 201
    for name, there in (("goes", True), ("goes-too", False)):
        assert sha(heads) in stored(folder)
        assert real.http.delete(f"/v1/adapters/{name}").status_code == 202
        assert eventually(lambda n=name: n not in listed(real)), "the row is gone"
        assert (sha(heads) in stored(folder)) == there
        assert eventually(lambda t=there: evicted(real, sha(heads)) != t)


def test_a_restart_keeps_them(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        made = upload(server, "guessed", HEADS).json()
    for _ in range(2):
        with running(tmp_path) as server:
            assert eventually(lambda s=server: shown(s, "guessed").get("status") == "ready")
            view = shown(server, "guessed")
            assert (view["digest"], view["heads_digest"]) == (made["digest"], sha(HEADS))
            assert len(stored(tmp_path)) == 3
            assert told(server, model="guessed")["heads"] == sha(HEADS)
            assert upload(server, "guessed", HEADS).status_code == 200


def test_heads_that_rotted_are_not_served_after_a_repair(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        assert upload(server, "guessed", HEADS).status_code == 201
    for packed in (tmp_path / "data" / "packed").iterdir():
        packed.unlink()
    path = tmp_path / "data" / "blobs" / "sha256" / sha(HEADS)[:2] / sha(HEADS)
    path.write_bytes(HEADS[:-1] + b"?")
    with running(tmp_path) as server:
        assert eventually(lambda: shown(server, "guessed")["status"] == "failed", within_s=30)
        assert shown(server, "guessed")["error"]["code"] == "blob_corrupt"
        assert upload(server, "guessed", HEADS).status_code == 201, "uploading again mends it"


def test_a_tenants_heads_are_its_own_and_count(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    texts = [grant(keys, tenant) for tenant in ("acme", "else")]
    room = 2 * len(WEIGHTS) + len(HEADS) + len(OTHERS)
    with editing(keys) as content:
        content.tenants["acme"] = Limits(max_adapter_bytes=room)
    with running(tmp_path, api_keys=keys) as server:
        server.http.headers.update(bearer(texts[0]))
        acme, other = client(server, texts[0]), client(server, texts[1])
        assert upload(acme, "a", HEADS).status_code == 201
        body = {"name": "x", "heads": f"sha256:{sha(HEADS)}"}
        body |= {"config": f"sha256:{sha(CONFIG)}", "weights": f"sha256:{sha(WEIGHTS)}"}
        for data in (CONFIG, WEIGHTS):
            put(other, data)
        error = refusal(other.http.post("/v1/adapters", json=body), 404)
        assert (error["code"], error["param"]) == ("blob_not_found", "heads"), "not seen to exist"
        assert refusal(upload(acme, "b", HEADS), 403)["code"] == "quota_exceeded"
        assert upload(acme, "b", OTHERS).status_code == 201, "to the last byte"
        assert refusal(put(acme, b"x"), 403)["code"] == "quota_exceeded"
        assert upload(acme, "a", HEADS).status_code == 200, "nothing new"
        assert upload(other, "a", HEADS).status_code == 201
        acme.http.delete("/v1/adapters/a")
        assert eventually(lambda: "a" not in listed(acme))
        assert sha(HEADS) in stored(tmp_path), "the other's stay"
        assert upload(acme, "c", HEADS).status_code == 201


def test_folders_of_the_command_line_bring_theirs(tmp_path: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / "shelf" / name).mkdir(parents=True)
        (tmp_path / "shelf" / name / "adapter_config.json").write_bytes(CONFIG)
        (tmp_path / "shelf" / name / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "shelf" / "with" / "medusa_heads.safetensors").write_bytes(HEADS)
    shelf = tmp_path / "shelf"
    with running(tmp_path, adapters=shelf, lora_path_root=shelf) as server:
        assert eventually(lambda: shown(server, "with").get("status") == "ready", within_s=30)
        assert shown(server, "with")["heads_digest"] == sha(HEADS)
        assert shown(server, "without")["heads_digest"] == ""
        loaded = server.post("/v1/load_lora_adapter", lora_name="loaded", lora_path="with")
        assert loaded.status_code == 200, loaded.text
        assert shown(server, "loaded")["heads_digest"] == sha(HEADS)
        link = shelf / "without" / "medusa_heads.safetensors"
        (tmp_path / "outside").write_bytes(HEADS)
        link.symlink_to(tmp_path / "outside")
        path = {"lora_name": "x", "lora_path": "without"}
        assert refusal(server.post("/v1/load_lora_adapter", **path))["code"] == "path_not_allowed"
