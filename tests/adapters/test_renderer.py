"""Templates from strangers: what they say, and that nothing they do outlives their process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loramux.adapters.chat_template import ChatTemplate, TemplateRefuses
from loramux.adapters.renderer import Renderer
from loramux.errors import InvalidRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "héllo 😀\n{{ 1 }}"}]
GOOD = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ extra }}"

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}"
)
HOSTILE = {
    "an endless loop": (NESTED, "ran out of fuel"),
    "an endless loop in filters": (
        "{% for i in range(99999) %}{% set x = range(99999) | sort | reverse | list %}{% endfor %}",
        "too much time",
    ),
    "a text that doubles": (DOUBLING, "too much memory"),
    "a huge text, block by block": (
        "{% for i in range(99999) %}" + "y" * 60_000 + "{% endfor %}",
        "too much memory",
    ),
    "a huge replacement": (
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) | length }}",
        "too much memory",
    ),
    "a large text": ("{{ 'x' * 20000000 }}", "more than 16777216 characters"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a way to Python": ("{{ ''.__class__.__mro__ }}", "undefined value"),
    "a way to Python's globals": ("{{ raise_exception.__globals__['os'] }}", "undefined value"),
    "a file": ("{% include '/etc/passwd' %}", "not found"),
    "a module": ("{% import 'os' as os %}{{ os }}", "not found"),
    "a function of Jinja's": ("{{ lipsum(100) }}", "unknown"),
    "no template": ("{% for %}", "does not compile"),
    "brackets": ("{{ " + "(" * 30_000, "does not compile"),
}


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.close()


def test_it_says_what_the_same_template_says_here(renderer: Renderer) -> None:
    expected = ChatTemplate(GOOD, TOKENS).render(CHAT, {"extra": 5})
    assert expected == "<s>[user]héllo 😀\n{{ 1 }}5"
    for _ in range(2):  # the second time it is compiled
        assert renderer.render(GOOD, TOKENS, CHAT, {"extra": 5}) == expected
    assert renderer.render(GOOD, {}, CHAT, {}) == "[user]héllo 😀\n{{ 1 }}"
    large = [{"role": "user", "content": "é" * 3_000_000}]
    assert renderer.render(GOOD, {}, large, {}) == "[user]" + "é" * 3_000_000


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates_are_refused_and_the_next_one_is_served(
    renderer: Renderer, what: str
) -> None:
    source, why = HOSTILE[what]
    with pytest.raises(InvalidRequest, match=f"(?s)the adapter's chat template.*{why}") as caught:
        renderer.render(source, TOKENS, CHAT, {})
    assert caught.value.param == "messages" and not isinstance(caught.value, TemplateRefuses)
    assert renderer.render(GOOD, TOKENS, CHAT, {}).startswith("<s>[user]")


def test_a_template_that_says_no(renderer: Renderer) -> None:
    with pytest.raises(TemplateRefuses, match="the adapter's chat template refuses.*: not today"):
        renderer.render("{{ raise_exception('not today') }}", TOKENS, CHAT, {})


def test_it_knows_nothing_of_the_environment_and_gets_little_memory(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    renderer.render(GOOD, TOKENS, CHAT, {})
    assert renderer._process is not None
    with open(f"/proc/{renderer._process.pid}/environ") as file:
        assert {v.partition("=")[0] for v in file.read().split("\0")} - {""} == {"PYTHONPATH"}
    with open(f"/proc/{renderer._process.pid}/limits") as file:
        (line,) = [line for line in file if line.startswith("Max address space")]
    assert line.split()[3] == line.split()[4] == str(256 << 20)


def test_one_that_was_killed_is_started_again(renderer: Renderer) -> None:
    renderer.render(GOOD, TOKENS, CHAT, {})
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    assert renderer.render(GOOD, TOKENS, CHAT, {}).startswith("<s>[user]")


def test_it_ends_when_nobody_asks_any_more(renderer: Renderer) -> None:
    renderer.render(GOOD, TOKENS, CHAT, {})
    process = renderer._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


def test_threads_take_turns(renderer: Renderer) -> None:
    wrong = []

    def ask(number: int) -> None:
        for index in range(20):
            chat = [{"role": "user", "content": f"{number} {index}"}]
            if renderer.render(GOOD, TOKENS, chat, {}) != f"<s>[user]{number} {index}":
                wrong.append((number, index))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
