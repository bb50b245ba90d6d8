"""Chat messages to a prompt, by the model's own Jinja template, on a leash.

Templates come with models and messages from strangers: minijinja gives a template no way to Python
objects, and fuel bounds how long it runs. Helpers and whitespace rules are those templates are
written against (``apply_chat_template`` of transformers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import minijinja

from loramux.errors import ConfigError, InvalidRequest

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

_FUEL = 5_000_000
"""Instructions a template may run: about half a second."""
_MAX_CHARS = 16 << 20
_MAX_REASON = 500

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
"""Marks assistant tokens for training; for a prompt it is a block that is always shown."""


class _Refused(Exception):
    """The template called ``raise_exception``."""


class TemplateRefuses(InvalidRequest):
    """A template that works said no to these messages, with ``raise_exception``."""


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def find_template(model: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """``chat_template.jinja``, else tokenizer_config.json's ``chat_template`` (the "default")."""
    file = model / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError("tokenizer_config.json: chat_template is neither a text nor a list")
    return template


def _reason(error: Exception) -> str:
    """Without the whole template, which minijinja's errors carry after their first line."""
    return str(error).partition("\n")[0][:_MAX_REASON]


def special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; older files write them as objects with a ``content``."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = tokenizer_config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


class ChatTemplate:
    """A compiled template; ``render`` may be called from any thread.

    ``owner`` is whose template it is, for messages: "the model's", "the adapter's".
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], owner: str = "the model's"
    ) -> None:
        """Raises ConfigError when the template does not compile."""

        def block(match: re.Match[str]) -> str:
            return match[1] + ("endif" if match[2] else "if true") + match[3]

        self._special_tokens = special_tokens
        self._owner = owner
        self._environment = minijinja.Environment(
            templates={"chat": _GENERATION_TAG.sub(block, source)},
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            fuel=_FUEL,
            trim_blocks=True,
            lstrip_blocks=True,
            debug=False,
        )
        try:
            self._environment.undeclared_variables_in_template("chat")
        except minijinja.TemplateError as error:
            raise ConfigError(f"{owner} chat template does not compile: {_reason(error)}") from None

    def render(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt. Raises InvalidRequest when the template refuses or fails on the messages."""
        context: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        try:
            text: str = self._environment.render_template(
                "chat", **{**context, **variables, "messages": list(messages)}
            )
        except _Refused as error:
            raise TemplateRefuses(
                f"{self._owner} chat template refuses these messages: {_reason(error)}",
                param="messages",
            ) from None
        except (minijinja.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{self._owner} chat template fails on these messages: {_reason(error)}",
                param="messages",
            ) from None
        if len(text) > _MAX_CHARS:
            raise InvalidRequest(
                f"{self._owner} chat template makes more than {_MAX_CHARS} characters of these"
                " messages",
                param="messages",
            )
        return text
