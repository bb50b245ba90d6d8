"""What a profile may say, how it is spelled, and that an adapter with one is another version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.blobs import adapter_digest
from loramux.adapters.profile import MAX_PROFILE_BYTES, Defaults, parse_profile, spell
from loramux.adapters.registry import Registry
from loramux.errors import AdapterInvalid, Conflict, InvalidRequest, PayloadTooLarge
from loramux.http.schemas import ChatRequest, CompletionRequest

FULL: dict[str, Any] = {
    "chat_template": "{{ messages }}",
    "system": "Be kind. 日本",
    "generation": {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2.0,
        "max_tokens": 5,
    },
    "stop": ["a", "b"],
    "stop_token_ids": [3, 319],
    "eos_token_id": 7,
    "companions": {"draft": "d.1", "small": "s"},
}
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def test_everything_at_once() -> None:
    profile = parse_profile(spell(FULL), 320)
    assert profile.model_dump() == {**FULL, "eos_token_id": [7]}
    assert profile.generation.given == FULL["generation"]
    assert parse_profile(spell({"system": "x"})).generation.given == {}
    assert parse_profile(spell({**FULL, "stop_token_ids": [10**6]})).stop_token_ids == [10**6]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tempurature": 1}, "profile.tempurature: no such field"),
    ({"generation": {"temperature": 2.01}}, "profile.generation.temperature: input should be less"),
    ({"generation": {"temperature": True}}, "profile.generation.temperature: input should be a v"),
    ({"generation": {"top_p": 0}}, "profile.generation.top_p: "),
    ({"generation": {"top_k": 1.5}}, "profile.generation.top_k: "),
    ({"generation": {"max_tokens": 0}}, "profile.generation.max_tokens: "),
    ({"generation": {"seed": 1}}, "profile.generation.seed: no such field"),
    ({"generation": None}, "profile.generation: "),
    ({"generation": {"min_p": None}}, "profile.generation.min_p: "),
    ({"chat_template": ""}, "profile.chat_template: "),
    ({"chat_template": ["x"]}, "profile.chat_template: "),
    ({"system": 5}, "profile.system: "),
    ({"stop": "x"}, "profile.stop: "),
    ({"stop": [""]}, "profile.stop[0]: "),
    ({"stop": ["x" * 1025]}, "profile.stop[0]: "),
    ({"stop": ["a", "b", "c", "d", "e"]}, "profile.stop: "),
    ({"stop_token_ids": [-1]}, "profile.stop_token_ids[0]: "),
    ({"stop_token_ids": [320]}, "profile.stop_token_ids[0]: the base has token ids below 320"),
    ({"stop_token_ids": ["3"]}, "profile.stop_token_ids[0]: "),
    ({"eos_token_id": [1, 999]}, "profile.eos_token_id[1]: the base has token ids below 320"),
    ({"eos_token_id": True}, "profile.eos_token_id: "),
    ({"companions": {"draft": "a/b"}}, "profile.companions.draft: "),
    ({"companions": {"draft": "a\n"}}, "profile.companions.draft: "),
    ({"companions": {"large": "a"}}, "profile.companions.large: no such field"),
    ({"a\nb": 1}, "profile.'a\\nb': no such field"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_wrong_is_named_with_its_path(number: int) -> None:
    value, problem = BAD[number]
    with pytest.raises(AdapterInvalid) as caught:
        parse_profile(spell(value), 320)
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_every_problem_is_listed() -> None:
    value = {"x": 1, "stop": [5], "generation": {"top_p": 7, "y": 1}, "companions": {"draft": 1}}
    with pytest.raises(AdapterInvalid) as caught:
        parse_profile(spell(value))
    paths = {problem.partition(":")[0] for problem in caught.value.problems}
    assert paths == {
        "profile.x",
        "profile.stop[0]",
        "profile.generation.top_p",
        "profile.generation.y",
        "profile.companions.draft",
    }


def test_a_field_too_long_to_show_is_cut() -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse_profile(spell({"x" * 9000: 1}))
    assert len(caught.value.problems[0]) < 300


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize("name", sorted(Defaults.model_fields))
def test_defaults_have_the_ranges_of_requests(kind: Any, name: str) -> None:
    request = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}

    def taken(value: Any) -> tuple[bool, bool]:
        try:
            parse_profile(spell({"generation": {name: value}}))
            by_profile = True
        except AdapterInvalid:
            by_profile = False
        try:
            kind.parse({**request, name: value}, strict=False, ignored=lambda _: None)
            return by_profile, True
        except InvalidRequest:
            return by_profile, False

    values = [v / 2 for v in range(-6, 24)] + [*range(-3, 12), 1e-9, 2**31 - 1, 2**31, "1", True]
    assert {taken(value) for value in values} == {(True, True), (False, False)}


def test_one_spelling() -> None:
    text = b'{ "stop": ["\\u00e9"],\n "generation": {"top_p": 0.5, "min_p": 0} }'
    assert spell(text) == '{"generation":{"min_p":0,"top_p":0.5},"stop":["é"]}'.encode()
    assert spell(text) == spell(json.loads(text)) == spell(spell(text))
    assert spell(b"{}") == spell({}) == b""


@pytest.mark.parametrize(
    "value",
    [b"", b"[]", b"null", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff{}", b"{"]
    + [b'{"a": "\\ud800"}', b'{"a":' + b"[" * 50_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_plain_object_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spell(value)
    assert caught.value.param == "profile" and len(caught.value.message) < 300


def test_the_largest() -> None:
    shell = len(spell({"system": ""}))
    assert len(spell({"system": "x" * (MAX_PROFILE_BYTES - shell)})) == MAX_PROFILE_BYTES
    with pytest.raises(PayloadTooLarge):
        spell({"system": "é" * (MAX_PROFILE_BYTES // 2 - shell // 2 + 1)})


def test_the_profile_is_part_of_the_digest() -> None:
    assert adapter_digest(A, B) == adapter_digest(A, B, "")
    assert len({adapter_digest(A, B), adapter_digest(A, B, C), adapter_digest(A, B, A)}) == 3


def test_the_registry_keeps_it_and_counts_its_blob(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    plain, _ = registry.create("x", config_digest=A, weights_digest=B)
    assert plain.files == (A, B) and not registry.uses_blob(C)
    with pytest.raises(Conflict):  # the same weights that speak otherwise are another version
        registry.create("x", config_digest=A, weights_digest=B, profile_digest=C)
    row, fresh = registry.create(
        "x", config_digest=A, weights_digest=B, profile_digest=C, expected_generation=1
    )
    assert fresh and row.generation == 2 and row.digest == adapter_digest(A, B, C)
    assert row.files == (A, B, C)
    again, fresh = registry.create("x", config_digest=A, weights_digest=B, profile_digest=C)
    assert (again.id, fresh) == (row.id, False)
    assert registry.uses_blob(C) and registry.uses_blob(C, tenant="")
    assert not registry.uses_blob(C, tenant="other")
    registry.close()
    registry = Registry(tmp_path)
    assert registry.get("x", generation=2).profile_digest == C
    registry.forget(row.id)
    assert not registry.uses_blob(C) and registry.uses_blob(B)
    registry.close()
