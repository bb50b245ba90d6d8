"""Profiles on their way in: HTTP, the front and the real ingest process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters.peft_files import make_config, make_tensors, safetensors_bytes
from tests.adapters.test_renderer import HOSTILE
from tests.client.doubles import Both
from tests.front.fake_engine import ready
from tests.front.house import configure
from tests.front.uploading import blobs as stored
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import put, real_server, sha

from loramux.adapters.blobs import adapter_digest
from loramux.adapters.profile import MAX_PROFILE_BYTES, spell
from loramux.front.front import INGEST

CONFIG = json.dumps(make_config()).encode()
WEIGHTS = safetensors_bytes(make_tensors(ready(1).base))
CHAT = [{"role": "user", "content": "hi"}]
PROFILE: dict[str, Any] = {
    "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "generation": {"temperature": 0.5, "max_tokens": 5},
    "stop": ["é"],
}


running = partial(real_server, ingest=INGEST)
"""With the ingest process that reads profiles."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with running(folder) as server:
        yield server


def upload(
    server: Running, name: str, profile: Any = None, query: str = "?wait=60", **parts: bytes
) -> httpx.Response:
    files = {"config": CONFIG, "weights": WEIGHTS, **parts}
    if profile is not None:
        files["profile"] = profile if isinstance(profile, bytes) else json.dumps(profile).encode()
    return server.http.post("/v1/adapters" + query, data={"name": name}, files=files)


def tokens(server: Running, model: str) -> Any:
    return server.post("/tokenize", model=model, messages=CHAT, return_token_strs=True).json()


def test_the_same_weights_that_speak_otherwise_are_another_version(
    real: Running, folder: Path
) -> None:
    plain = upload(real, "plain")
    assert plain.status_code == 201, plain.text
    spoken = upload(real, "spoken", PROFILE)
    assert spoken.status_code == 201, spoken.text
    profile_digest = sha(spell(PROFILE))
    assert plain.json()["digest"] == adapter_digest(sha(CONFIG), sha(WEIGHTS))
    assert spoken.json()["digest"] == adapter_digest(sha(CONFIG), sha(WEIGHTS), profile_digest)
    assert spoken.json()["profile_digest"] == profile_digest
    assert {sha(CONFIG), sha(WEIGHTS), profile_digest} <= stored(folder)
    shown = real.http.get("/v1/adapters/spoken").json()
    assert shown["profile"] == PROFILE
    assert real.http.get("/v1/adapters/plain").json()["profile"] is None
    assert "".join(tokens(real, "spoken")["token_strs"]) == "<s>[hi]"
    assert "".join(tokens(real, "plain")["token_strs"]) == "<|user|>hi</s>\n<|assistant|>"
    answer = real.complete([40, 41, 42], model="spoken")
    assert answer.json()["usage"]["completion_tokens"] == 5, answer.text
    # Another spelling is the same version; an empty profile is none; another profile is refused.
    assert upload(real, "spoken", json.dumps(PROFILE, indent=3).encode()).status_code == 200
    assert upload(real, "plain", {}).status_code == 200
    error = refusal(upload(real, "spoken", {"system": "x", **PROFILE}), 409)
    assert error["code"] == "generation_conflict"
    changed = {**PROFILE, "chat_template": "other"}
    answer = upload(real, "spoken", changed, "?wait=60&expected_generation=1")
    assert answer.status_code == 201 and answer.json()["generation"] == 2
    assert "".join(tokens(real, "spoken")["token_strs"]) == "other"
    assert "".join(tokens(real, "spoken@1")["token_strs"]) == "<s>[hi]"
    weights = [digest for digest in stored(folder) if digest == sha(WEIGHTS)]
    assert len(weights) == 1


def test_deleting_takes_the_profile_and_leaves_what_others_use(real: Running, folder: Path) -> None:
    profile = {"system": "only here", "chat_template": "{{ messages[0].content }}"}
    assert upload(real, "stays").status_code == 201
    assert upload(real, "goes", profile).status_code == 201
    assert upload(real, "goes-too", profile).status_code == 201
    digest = sha(spell(profile))
    for name, there in (("goes", True), ("goes-too", False)):
        assert digest in stored(folder)
        assert real.http.delete(f"/v1/adapters/{name}").status_code == 202
        assert eventually(lambda n=name: n not in listed(real)), "the row is gone"
        assert (digest in stored(folder)) == there
    assert sha(WEIGHTS) in stored(folder) and real.complete(model="stays").status_code == 200


def test_a_blend_has_a_profile_of_its_own_or_none(real: Running) -> None:
    source = upload(real, "source", {"system": "not inherited"}).json()
    blend = {"method": "soup", "sources": [{"id": "source", "weight": 1}]}

    def made(name: str, **fields: Any) -> Any:
        body = {"name": name, "blend": blend, **fields}
        answer = real.http.post("/v1/adapters?wait=60", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    plain, spoken = made("blend-plain"), made("blend-spoken", profile=PROFILE)
    assert plain["profile_digest"] == "" and spoken["profile_digest"] == sha(spell(PROFILE))
    assert plain["digest"] != spoken["digest"]
    assert spoken["report"]["blend"]["sources"][0]["digest"] == source["digest"]


def listed(server: Running) -> set[str]:
    return {view["name"] for view in server.http.get("/v1/adapters").json()["data"]}


def test_as_json_inline_or_by_its_digest(real: Running) -> None:
    files = {"weights": f"sha256:{sha(WEIGHTS)}", "config": f"sha256:{sha(CONFIG)}"}
    text = json.dumps(PROFILE, indent=1).encode()
    for data in (CONFIG, WEIGHTS, text):
        put(real, data)

    def register(name: str, **fields: Any) -> httpx.Response:
        return real.http.post("/v1/adapters?wait=60", json={"name": name, **files, **fields})

    inline = register("inline", profile=PROFILE)
    named = register("named", profile=f"sha256:{sha(text)}")
    assert inline.status_code == named.status_code == 201, named.text
    assert inline.json()["digest"] == named.json()["digest"]
    assert inline.json()["profile_digest"] == sha(spell(PROFILE))
    assert register("none", profile=None).json()["profile_digest"] == ""
    missing = register("a", profile=f"sha256:{'0' * 64}")
    assert refusal(missing, 404)["param"] == "profile"
    for wrong in ("", 5, [], False, f"sha256:{'0' * 63}", "{}"):
        error = refusal(register("a", profile=wrong))
        assert (error["code"], error["param"]) == ("digest_malformed", "profile")
    large = {"system": "x" * MAX_PROFILE_BYTES}
    assert refusal(register("a", profile=large), 413)["param"] == "profile"
    put(real, json.dumps(large).encode())
    by_digest = register("a", profile=f"sha256:{sha(json.dumps(large).encode())}")
    assert refusal(by_digest, 413)["param"] == "profile"
    assert refusal(register("a", profile=f"sha256:{sha(WEIGHTS)}"))["param"] == "profile"


@pytest.mark.parametrize("profile", [b"[]", b"{", b'{"a": NaN}', b'{"a":1,"a":1}', b"\xff"])
def test_what_is_no_object_is_refused_at_once(real: Running, folder: Path, profile: bytes) -> None:
    before = stored(folder)
    assert refusal(upload(real, "bad", profile))["param"] == "profile"
    assert eventually(lambda: stored(folder) == before)
    assert real.http.get("/v1/adapters/bad").status_code == 404


def test_one_that_is_too_large_is_cut_off(real: Running) -> None:
    answer = upload(real, "bad", b'{"system": "' + b"x" * MAX_PROFILE_BYTES)
    assert refusal(answer, 413)["param"] == "profile"


def test_every_problem_of_the_profile_and_of_the_weights_is_listed(real: Running) -> None:
    profile = {"generation": {"temperature": 3}, "stop_token_ids": [1, 999], "x": 1}
    config = json.dumps(make_config(use_dora=True, r=0)).encode()
    error = refusal(upload(real, "bad", profile, config=config), 422)
    assert error["code"] == "adapter_invalid"
    paths = [problem.partition(":")[0] for problem in error["problems"]]
    assert {"profile.generation.temperature", "profile.x"} <= set(paths)
    assert any("r=0" in problem or "use_dora" in problem for problem in error["problems"])
    dry = upload(real, "dry", profile, "?validate_only=1")
    assert len(refusal(dry, 422)["problems"]) == 2
    error = refusal(upload(real, "dry", {"stop_token_ids": [320]}, "?validate_only=1"), 422)
    assert error["message"] == "profile.stop_token_ids[0]: the base has token ids below 320"
    good = upload(real, "dry", PROFILE, "?validate_only=1").json()
    assert good["generation"] == 0 and good["profile_digest"] == sha(spell(PROFILE))
    # Without waiting, the verdict is in the adapter's state; it is never served.
    assert upload(real, "later", {"x": 1}, "").status_code == 202
    assert eventually(
        lambda: real.http.get("/v1/adapters/later").json()["status"] == "failed", within_s=30
    )
    later = real.http.get("/v1/adapters/later").json()
    assert later["error"]["problems"] == ["profile.x: no such field"]
    assert later["profile"] is None, "what failed keeps no files"
    assert refusal(real.chat(model="later"), 409)["code"] == "adapter_failed"


@pytest.mark.parametrize("what", [w for w in HOSTILE if not w.startswith("a huge")])
def test_a_hostile_template_is_refused_and_the_ingest_process_lives(
    real: Running, what: str
) -> None:
    template, why = HOSTILE[what]
    pid = ingest_pid()
    error = refusal(upload(real, "hostile", {"chat_template": template}), 422)
    (problem,) = error["problems"]
    assert problem.startswith("profile.chat_template: the adapter's chat template")
    assert why in problem
    assert ingest_pid() == pid
    assert refusal(real.chat(model="hostile"), 409)["code"] == "adapter_failed"


def ingest_pid() -> int:
    """Of this process's child that is one."""
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            if "loramux.ingest.main" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
    raise AssertionError("no ingest process")


SYSTEM_REFUSED = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
)


def test_templates_are_tried_on_two_chats(real: Running) -> None:
    """A template may refuse what it was not made for, but not fail on it."""
    only_users = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}"
    fine = upload(real, "only-users", {"chat_template": only_users + "{% endif %}{% endfor %}x"})
    assert fine.status_code == 201, fine.text
    breaks = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.a.b }}{% endif %}{% endfor %}"
    )
    error = refusal(upload(real, "breaks", {"chat_template": breaks}), 422)
    assert "undefined value" in error["problems"][0]
    never = "{{ raise_exception('never') }}"
    error = refusal(upload(real, "never", {"chat_template": never}), 422)
    assert error["problems"][0].startswith("profile.chat_template") and "never" in error["message"]


def test_a_system_message_has_to_be_one_the_template_takes(real: Running) -> None:
    ours = {"chat_template": SYSTEM_REFUSED + "x", "system": "be kind"}
    error = refusal(upload(real, "ours", ours), 422)
    assert error["message"].startswith("profile.system: ") and "no system" in error["message"]
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system!') }}{% endif %}x"
    answer = upload(real, "needs", {"chat_template": needs, "system": "be kind"})
    assert answer.status_code == 201, answer.text
    assert upload(real, "bases", {"system": "be kind"}).status_code == 201


def test_a_system_message_the_bases_template_refuses(tmp_path: Path) -> None:
    configure(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(SYSTEM_REFUSED + "x")
    with running(tmp_path) as server:
        error = refusal(upload(server, "bases", {"system": "be kind"}), 422)
        assert error["message"].startswith("profile.system: the model's chat template refuses")
        assert upload(server, "bases", {"stop": ["x"]}).status_code == 201


def test_a_restart_keeps_profiles(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        assert upload(server, "spoken", PROFILE).status_code == 201
        before = tokens(server, "spoken")
    for _ in range(2):
        with running(tmp_path) as server:
            assert server.http.get("/v1/adapters/spoken").json()["profile"] == PROFILE
            assert tokens(server, "spoken") == before
            assert upload(server, "spoken", PROFILE).status_code == 200
            assert len(stored(tmp_path)) == 3


def test_a_profile_that_rotted_is_not_served_after_a_repair(tmp_path: Path) -> None:
    """Its packed file is gone and its profile damaged: packing again finds out."""
    with running(tmp_path) as server:
        digest = upload(server, "spoken", PROFILE).json()["profile_digest"]
    for packed in (tmp_path / "data" / "packed").iterdir():
        packed.unlink()
    path = tmp_path / "data" / "blobs" / "sha256" / digest[:2] / digest
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    with running(tmp_path) as server:
        shown = server.http.get("/v1/adapters/spoken").json()
        assert shown["status"] == "failed" and shown["error"]["code"] == "blob_corrupt"
        assert (shown["profile"], shown["profile_digest"]) == (None, digest)
        assert upload(server, "spoken", PROFILE).status_code == 201, "uploading again mends it"
        assert server.http.get("/v1/adapters/spoken").json()["profile"] == PROFILE


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_push_brings_what_lies_in_the_folder(real: Running, kind: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": 7}')
    client = Both(kind, real.url)
    try:
        pushed = client.call("adapters.push", tmp_path, f"pushed-{kind}")
        assert client.call("adapters.show", pushed.name).profile == {
            "chat_template": "{{ messages[0].content }}!",
            "generation": {"temperature": 0},
            "eos_token_id": 7,
        }
        bare = client.call("adapters.push", tmp_path, f"bare-{kind}", profile=False)
        assert bare.profile_digest == "" and bare.digest != pushed.digest
    finally:
        client.close()
