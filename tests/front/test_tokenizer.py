"""The tokenizer service, and chat templates against transformers' own rendering."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import configure
from tests.front.model_dir import CHAT, KINDS, write_model
from transformers.utils.chat_template_utils import render_jinja_template

from loramux.adapters.chat_template import ChatTemplate, find_template
from loramux.config import DEMO_DIR
from loramux.errors import ConfigError, InvalidRequest
from loramux.front.detokenizer import TokenBytes
from loramux.front.front import Front
from loramux.front.tokenizer import TokenizerService, check_partner, longest_token


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TokenizerService]:
    service = TokenizerService(write_model(tmp_path / "model"))
    yield service
    service.close()


def test_a_prompt_is_never_cut_and_comes_back(service: TokenizerService) -> None:
    text = "the quick brown fox, 日本語 and 😀"
    ids = asyncio.run(service.encode(text))
    assert len(ids) > 4
    assert asyncio.run(service.decode(ids)) == text


def test_eos_ids_are_all_that_any_file_names(service: TokenizerService) -> None:
    assert service.eos_ids == (1, 7)
    assert service.vocab_size == 320


def test_special_tokens_are_shown_only_on_request(service: TokenizerService) -> None:
    ids = asyncio.run(service.encode("a</s>"))
    assert ids[-1] == 1
    assert asyncio.run(service.decode(ids, skip_special_tokens=True)) == "a"
    assert asyncio.run(service.decode(ids)) == "a</s>"


def test_token_text_is_faithful_to_bytes(service: TokenizerService) -> None:
    half = asyncio.run(service.encode("日"))[0]
    piece = service.token_bytes(half)
    assert "日".encode().startswith(piece) and piece != "日".encode()
    assert service.token_text(half) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    assert service.token_text(asyncio.run(service.encode("a"))[0]) == "a"
    assert service.token_bytes(10_000) == service.token_bytes(-1) == b""


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TokenizerService(tmp_path)


def test_a_template_that_does_not_compile_leaves_completions(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for %}")
    service = TokenizerService(model)
    assert not service.has_chat_template
    assert asyncio.run(service.encode("a"))
    with pytest.raises(InvalidRequest, match="does not compile"):
        asyncio.run(service.render_chat([{"role": "user", "content": "hi"}]))
    service.close()


def test_render_chat(service: TokenizerService) -> None:
    messages = [{"role": "user", "content": " hi "}]
    assert asyncio.run(service.render_chat(messages)) == "<|user|>hi</s>\n<|assistant|>"
    bare = asyncio.run(service.render_chat(messages, add_generation_prompt=False))
    assert bare == "<|user|>hi</s>\n"


TEMPLATES = {
    "chatml": (
        "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\\n' + "
        "messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n"
        "    {%- if message.role != 'system' or not loop.first %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "headers": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = '1 Jan' %}\n{%- endif %}\n"
        "{%- if tools is not none %}{{ raise_exception('no tools') }}{%- endif %}\n"
        "{%- for message in messages %}\n{{- '<h>' + message['role'] + '</h>\\n\\n' + date_string"
        " + message['content'] | trim + '<e>' }}\n{%- endfor %}\n"
    ),
    "alternation": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'].strip() %}{% else %}"
        "{% set loop_messages = messages %}{% set system = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' ~ (system or '') ~ message['content'] ~ "
        "' [/INST]' }}{% else %}{{ ' ' + message['content'].split('x')[-1] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "helpers": (
        "{% set ns = namespace(last=-1) %}\n{% for m in messages[::-1] %}\n"
        "  {% if m.role == 'user' and ns.last < 0 %}\n{% set ns.last = loop.index0 %}{% break %}\n"
        "  {% endif %}\n{% endfor %}\n{{ ns.last }}{{ messages | tojson }}\n"
        "{{ messages[0] | tojson(indent=2) }}{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}\n"
        "{% macro wrap(text, mark='*') %}{{ mark }}{{ text }}{{ mark }}{% endmacro %}\n"
        "{% for m in messages %}{% if m.content is string and m.nothing is not defined %}"
        "{{ wrap(m.content | upper, mark=m.role[0]) }}{% endif %}{% endfor %}\n"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}\n"
        "{{ messages | map(attribute='role') | join(',') }}\n"
        "{% generation %}{{ messages[-1].content.replace('o', '0') }}{% endgeneration %}\n\n"
    ),
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi <b>&amp; 'you'</b>"}],
    [{"role": "system", "content": " be kind\n"}, {"role": "user", "content": "日本 {{ 1 }}"}],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "foo x bar"},
        {"role": "user", "content": "\n\n{% raw %}"},
    ],
]


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(name: str, chat: int, prompt: bool) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        conversations=[CHATS[chat]],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        **tokens,
    )
    template = ChatTemplate(TEMPLATES[name], tokens)
    assert template.render(CHATS[chat], {"add_generation_prompt": prompt}) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{{ messages[0].a.b }}", "undefined value"),
        ("{{ messages | tojson(indent='a' * 3 + 1) }}", "fails"),
        ("{{ missing() }}", "missing"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "fuel"),
        ("{{ 'x' * 20000000 }}", "more than"),
        ("{{ ''.__class__.__mro__ }}", "fails"),
        ("{% include '/etc/passwd' %}", "fails"),
    ],
)
def test_a_template_that_refuses_or_fails_is_the_request_s_fault(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s){message}") as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}], {})
    assert caught.value.param == "messages"


def test_where_a_template_is_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": CHAT}) == CHAT
    assert find_template(tmp_path, {"chat_template": named}) == "D"
    assert find_template(tmp_path, {"chat_template": named[:1]}) is None
    with pytest.raises(ConfigError, match="chat_template"):
        find_template(tmp_path, {"chat_template": {"default": "D"}})
    (tmp_path / "chat_template.jinja").write_text("F")
    assert find_template(tmp_path, {"chat_template": CHAT}) == "F"


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="not a JSON object"):
        TokenizerService(model)


@pytest.mark.parametrize("param", ["draft_model", "small_model"])
def test_a_partner_has_to_read_the_same_token_ids(tmp_path: Path, param: str) -> None:
    base, partner = write_model(tmp_path / "base"), write_model(tmp_path / "partner")
    flag = "--" + param.replace("_", "-")
    tokenizer, config = partner / "tokenizer.json", partner / "config.json"
    fields = json.loads(tokenizer.read_text())
    # Written otherwise, and with limits that nobody obeys: the same.
    assert fields["truncation"] is not None
    tokenizer.write_text(json.dumps({**fields, "truncation": None}, indent=3, sort_keys=True))
    check_partner(base, partner, param)
    vocabulary = fields["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    swapped = {**vocabulary, first: vocabulary[second], second: vocabulary[first]}
    for other in (
        {**fields, "model": {**fields["model"], "vocab": swapped}},
        {**fields, "added_tokens": fields["added_tokens"][:-1]},
        {**fields, "normalizer": {"type": "Lowercase"}},
    ):
        tokenizer.write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=f"{flag}: .*another tokenizer") as caught:
            check_partner(base, partner, param)
        assert caught.value.param == param
    tokenizer.unlink()
    check_partner(base, partner, param)
    for vocab_size in (319, 321, None):
        config.write_text(json.dumps({"vocab_size": vocab_size}))
        with pytest.raises(ConfigError, match=f"{flag}: .*vocab_size of {vocab_size}.*320"):
            check_partner(base, partner, param)
    config.unlink()
    with pytest.raises(ConfigError, match=f"{flag}: .*config.json"):
        check_partner(base, partner, param)


def test_a_front_does_not_start_with_a_partner_that_reads_otherwise(tmp_path: Path) -> None:
    for param in ("draft_model", "small_model"):
        partner = write_model(tmp_path / param)
        (partner / "config.json").write_text('{"vocab_size": 5}')
        config = configure(tmp_path, **{param: partner})
        with pytest.raises(ConfigError) as caught:
            Front(config)
        assert caught.value.param == param


def test_the_demos_draft_is_a_partner_of_its_base() -> None:
    check_partner(DEMO_DIR / "base", DEMO_DIR / "draft", "draft_model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_at_least_the_tokens_that_its_bytes_say(kind: str) -> None:
    """Only byte-level tokenizers promise that; the others are never asked."""
    tokenizer = KINDS[kind]()
    longest = longest_token(tokenizer, TokenBytes(tokenizer))
    assert (longest is not None) == (kind == "byte_level")
    if longest is None:
        return
    for piece in (*tokenizer.get_vocab(), " ", "\n", "é", "日", "\u0301", "\0"):
        text = piece * 50
        assert len(tokenizer.encode(text).ids) * longest >= len(text.encode()), piece
