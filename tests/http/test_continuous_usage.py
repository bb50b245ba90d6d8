"""``stream_options.continuous_usage_stats``: every chunk says how many tokens its choice has."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.http.conftest import Running
from tests.http.fake_front import speak, tokens
from tests.http.test_speculation import in_threes

ASKED = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
CASES: list[dict[str, Any]] = [
    {"max_tokens": 7},
    {"max_tokens": 7, "n": 3},
    {"max_tokens": 40, "stop": "dog"},
    {"max_tokens": 9, "return_token_ids": True, "n": 2},
]


def chunks(text: str) -> list[dict[str, Any]]:
    assert text.endswith("data: [DONE]\n\n")
    return [msgspec.json.decode(event) for event in text.split("data: ")[1:-1]]


@pytest.mark.parametrize("body", CASES, ids=str)
@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_counts_grow_to_what_the_usage_chunk_says(
    shared: Running, kind: str, body: dict[str, Any]
) -> None:
    shared.front.script = speak("the wörld 😀 has a dog and a cat, as it should")
    *pieces, last = chunks(getattr(shared, kind)(**body, **ASKED).text)
    assert last["choices"] == []
    made: dict[int, int] = {}
    seen: dict[int, int] = {}
    for piece in pieces:
        [choice], usage = piece["choices"], piece["usage"]
        assert usage.keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        index = choice["index"]
        assert usage["completion_tokens"] >= made.get(index, 0)
        made[index] = usage["completion_tokens"]
        seen[index] = seen.get(index, 0) + len(choice.get("token_ids", []))
        if body.get("return_token_ids"):
            assert made[index] == seen[index]
    assert len(made) == body.get("n", 1)
    assert sum(made.values()) == last["usage"]["completion_tokens"]


def test_a_stop_string_within_a_step_takes_the_rest_of_the_step_back(shared: Running) -> None:
    shared.front.script = in_threes
    *pieces, last = chunks(shared.complete("a", max_tokens=7, stop="ef", **ASKED).text)
    assert pieces[-1]["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 6


def test_each_choice_has_the_prompt_it_continues(shared: Running) -> None:
    shared.front.script = speak("hello")
    prompts = ["a", "the dog"]
    *pieces, last = chunks(shared.complete(prompts, max_tokens=3, **ASKED).text)
    lengths = [len(tokens(prompt)) for prompt in prompts]
    for piece in pieces:
        assert piece["usage"]["prompt_tokens"] == lengths[piece["choices"][0]["index"]]
    assert last["usage"]["prompt_tokens"] == sum(lengths)


def test_a_prompt_that_is_only_echoed_makes_nothing(shared: Running) -> None:
    shared.front.script = speak("hello")
    *pieces, last = chunks(shared.complete("the dog", max_tokens=0, echo=True, **ASKED).text)
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [0] * len(pieces)
    assert last["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_without_it_only_the_last_chunk_counts(shared: Running, kind: str) -> None:
    shared.front.script = speak("hello")
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = chunks(getattr(shared, kind)(max_tokens=3, **asked).text)
    assert {piece["usage"] for piece in pieces} == {None}
    assert last["usage"]["completion_tokens"] == 3
