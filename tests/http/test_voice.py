"""What a request gets of its adapters' profiles, seen in what reaches the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tests.front.test_tokenizer import TEMPLATES
from tests.http.conftest import Running, Start
from tests.http.fake_front import row, speak
from tests.http.test_bad_inputs import refusal
from transformers.utils.chat_template_utils import render_jinja_template

from loramux.adapters.profile import spell
from loramux.front.generation import GenerationSpec

CHAT = [{"role": "user", "content": "hello"}]
DEFAULTS = {
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 9,
    "min_p": 0.25,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "repetition_penalty": 1.5,
}


class Speaking:
    """A server whose adapters have profiles."""

    def __init__(self, server: Running, folder: Path) -> None:
        self.server, self.folder = server, folder

    def add(self, name: str, **profile: Any) -> None:
        data = spell(profile)
        digest = hashlib.sha256(data).hexdigest() if data else ""
        if digest:
            (self.folder / digest).write_bytes(data)
        self.server.front.adapters.put(row(name, profile_digest=digest))

    def spec(self, path: str = "chat/completions", **body: Any) -> GenerationSpec:
        """What the engine is asked when a client sends this."""
        text = {"messages": CHAT} if path.startswith("chat") else {"prompt": "the dog"}
        answer = self.server.post(f"/v1/{path}", **{**text, **body})
        assert answer.status_code == 200, answer.text
        return self.server.front.specs[-1]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.server.front.tokenizer._encode(text, False)
        return ids


@pytest.fixture
def speaking(start: Start, tmp_path: Path) -> Iterator[Speaking]:
    server = start(data_dir=tmp_path)
    assert server.front.info is not None
    server.front.info = structs.replace(server.front.info, max_model_len=300)
    yield Speaking(server, tmp_path)


def test_each_adapter_has_its_own_template(speaking: Speaking) -> None:
    """Token for token what transformers makes of the same template."""
    chats: list[list[dict[str, Any]]] = [
        CHAT,
        [{"role": "system", "content": "é "}, {"role": "user", "content": "日本 {{ 1 }}"}],
    ]
    for name, template in TEMPLATES.items():
        speaking.add(name, chat_template=template)
    for name in [*TEMPLATES, *reversed(TEMPLATES)]:
        for chat in chats:
            (text,), _ = render_jinja_template(
                conversations=[chat],
                chat_template=TEMPLATES[name],
                add_generation_prompt=True,
                bos_token="<s>",
                eos_token="</s>",
            )
            expected = speaking.ids(text)
            assert speaking.spec(model=name, messages=chat).prompt_ids == expected
            tokens = speaking.server.post("/tokenize", model=name, messages=chat).json()
            assert tokens["tokens"] == expected
    base = speaking.spec(model="base").prompt_ids
    assert base == speaking.ids("<|user|>hello</s>\n<|assistant|>")
    assert speaking.server.post("/tokenize", messages=CHAT).json()["tokens"] == base
    bare = speaking.spec(model="chatml", add_generation_prompt=False).prompt_ids
    assert bare == speaking.ids("<|im_start|>user\nhello<|im_end|>\n")


def test_the_system_message_is_for_chats_that_have_none(speaking: Speaking) -> None:
    speaking.add("kind", chat_template=TEMPLATES["chatml"], system="be kind")
    expected = "<|im_start|>{}\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    said = speaking.spec(model="kind", add_generation_prompt=False).prompt_ids
    assert said == speaking.ids(expected.format("system"))
    own = [{"role": "system", "content": "x"}, *CHAT]
    assert speaking.ids("be kind")[0] not in speaking.spec(model="kind", messages=own).prompt_ids
    completion = speaking.spec("completions", model="kind")
    assert completion.prompt_ids == speaking.ids("the dog"), "templates are for chats"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_default_holds_where_the_request_says_nothing(
    speaking: Speaking, path: str, name: str
) -> None:
    speaking.add("mild", generation={name: DEFAULTS[name]})
    neutral = getattr(speaking.spec(path, model="base").sampling, name)
    assert neutral != DEFAULTS[name]
    assert getattr(speaking.spec(path, model="mild").sampling, name) == DEFAULTS[name]
    null = speaking.spec(path, model="mild", **{name: None}).sampling
    assert getattr(null, name) == DEFAULTS[name], "null is not set"
    own = speaking.spec(path, model="mild", **{name: neutral}).sampling
    assert getattr(own, name) == neutral
    beside = speaking.spec(path, model="base", adapter_id="mild", scale=0.5).sampling
    assert getattr(beside, name) == DEFAULTS[name]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_default_length_gives_way_where_the_context_ends(speaking: Speaking, path: str) -> None:
    speaking.add("short", generation={"max_tokens": 5})
    speaking.add("long", generation={"max_tokens": 500})
    assert speaking.spec(path, model="short").sampling.max_tokens == 5
    assert speaking.spec(path, model="short", max_tokens=None).sampling.max_tokens == 5
    assert speaking.spec(path, model="short", max_tokens=7).sampling.max_tokens == 7
    spec = speaking.spec(path, model="long")
    assert spec.sampling.max_tokens == 300 - len(spec.prompt_ids)
    text = {"messages": CHAT} if path.startswith("chat") else {"prompt": "the dog"}
    own = speaking.server.post(f"/v1/{path}", model="long", max_tokens=500, **text)
    assert refusal(own)["code"] == "context_length_exceeded", "what a client asks is not cut"
    assert speaking.spec(path, model="short", min_tokens=5).sampling.min_tokens == 5
    over = speaking.server.post(f"/v1/{path}", model="short", min_tokens=6, **text)
    assert refusal(over)["param"] == "min_tokens"
    assert speaking.spec(path, model="long", min_tokens=20).sampling.min_tokens == 20


def test_max_completion_tokens_beats_the_default_length(speaking: Speaking) -> None:
    speaking.add("short", generation={"max_tokens": 5})
    assert speaking.spec(model="short", max_completion_tokens=9).sampling.max_tokens == 9


def test_an_echo_without_output_stays_one(speaking: Speaking) -> None:
    speaking.add("short", generation={"max_tokens": 5})
    body = {"model": "short", "echo": True, "max_tokens": 0}
    answer = speaking.server.complete(**body).json()
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_stops_are_added_to_the_requests_own(speaking: Speaking, path: str) -> None:
    speaking.add("stopping", stop=["END", "###"], stop_token_ids=[5, 6])
    spec = speaking.spec(path, model="stopping")
    assert spec.stop == ("END", "###") and spec.sampling.stop_token_ids == (5, 6, 1, 7)
    spec = speaking.spec(path, model="stopping", stop=["x", "END"], stop_token_ids=[9, 6])
    assert spec.stop == ("x", "END", "###")
    assert spec.sampling.stop_token_ids == (9, 6, 5, 1, 7)
    four = ["1", "2", "3", "4"]
    assert len(speaking.spec(path, model="stopping", stop=four).stop) == 6
    assert speaking.spec(path, model="stopping", ignore_eos=True).sampling.stop_token_ids == (5, 6)


def test_a_stop_of_the_adapters_ends_the_text_and_is_the_reason(speaking: Speaking) -> None:
    speaking.server.front.script = speak("the dog and the fox")
    (x,) = speaking.ids("x")
    speaking.add("stopping", stop=[" and"], stop_token_ids=[x])
    choice = speaking.server.chat(model="stopping").json()["choices"][0]
    assert choice["message"]["content"] == "the dog"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " and")
    speaking.server.front.script = speak("the x dog")
    choice = speaking.server.chat(model="stopping").json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", x)


def test_an_eos_of_the_adapters_stands_in_for_the_bases(speaking: Speaking) -> None:
    (x,) = speaking.ids("x")
    speaking.add("ending", eos_token_id=x)
    assert speaking.spec(model="ending").sampling.stop_token_ids == (x,)
    assert speaking.spec(model="ending", ignore_eos=True).sampling.stop_token_ids == ()
    speaking.server.front.script = speak("the x dog")
    choice = speaking.server.chat(model="ending").json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_of_several_adapters_the_first_speaks_and_none_samples(speaking: Speaking) -> None:
    speaking.add("plain")
    speaking.add("one", chat_template="one{{ messages[0].content }}", stop=["A"])
    speaking.add("two", chat_template="two", system="s", generation=DEFAULTS, stop=["B"])
    chosen = [{"id": name, "scale": 0.5} for name in ("plain", "one", "two")]
    spec = speaking.spec(model="base", adapters=chosen)
    assert spec.prompt_ids == speaking.ids("ones"), "the template of one, the system of two"
    assert spec.stop == ("A", "B")
    assert spec.sampling.temperature == 1 and spec.sampling.top_p == 1
    alone = speaking.spec(model="base", adapters=chosen[2:])
    assert alone.sampling.top_p == 0.5 and alone.prompt_ids == speaking.ids("two")


def test_a_template_that_fails_names_the_adapters(speaking: Speaking) -> None:
    doubling = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    speaking.add("bomb", chat_template=doubling + "{% endfor %}{{ n.x }}")
    speaking.add("fussy", chat_template="{{ raise_exception('say please') }}")
    error = refusal(speaking.server.chat(model="bomb"))
    assert "the adapter's chat template takes too much memory" in error["message"]
    error = refusal(speaking.server.chat(model="fussy"))
    assert error["message"].endswith("say please") and error["param"] == "messages"
    answer = speaking.server.post("/tokenize", model="fussy", messages=CHAT)
    assert "the adapter's" in refusal(answer)["message"]
    assert speaking.server.chat().status_code == 200
    assert speaking.server.front.reserved == 0, "refused requests hold no place"


def test_a_profile_that_is_damaged_is_the_servers_fault(speaking: Speaking) -> None:
    speaking.add("torn", system="x")
    for path in speaking.folder.iterdir():
        if len(path.name) == 64:
            path.write_bytes(b"{}")
    for answer in (speaking.server.chat(model="torn"), speaking.server.complete(model="torn")):
        assert refusal(answer, 500)["code"] == "adapter_load_failed"
    assert speaking.server.front.reserved == 0


def test_show_has_the_profile_and_the_list_its_digest(speaking: Speaking) -> None:
    speaking.add("kind", system="be kind", companions={"draft": "d", "small": "s"})
    shown = speaking.server.http.get("/v1/adapters/kind").json()
    assert shown["profile"] == {
        "system": "be kind",
        "companions": {"draft": "d", "small": "s"},
    }
    listed = speaking.server.http.get("/v1/adapters").json()["data"]
    (kind,) = [view for view in listed if view["name"] == "kind"]
    assert kind["profile"] is None and kind["profile_digest"] == shown["profile_digest"]
    assert speaking.server.http.get("/v1/adapters/whisper").json()["profile"] is None


@pytest.mark.parametrize("content", ["\\ud800", "\\u0000", "\\ud83d\\ude00"])
def test_odd_characters_are_no_bug_of_ours(speaking: Speaking, content: str) -> None:
    speaking.add("odd", chat_template="{{ messages[0].content }}")
    body = '{"model": "%s", "messages": [{"role": "user", "content": "a%s"}]}'
    answers = {
        speaking.server.http.post(
            "/v1/chat/completions",
            content=body % (model, content),
            headers={"content-type": "application/json"},
        ).status_code
        for model in ("base", "odd")
    }
    assert answers == {400 if content == "\\ud800" else 200}
