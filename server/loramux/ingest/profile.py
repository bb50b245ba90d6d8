"""An adapter's profile, tried out before anybody talks to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from loramux.adapters.chat_template import (
    ChatTemplate,
    TemplateRefuses,
    find_template,
    special_tokens,
)
from loramux.adapters.profile import Profile, parse_profile
from loramux.adapters.renderer import Renderer
from loramux.adapters.strict_json import NotStrictJson, parse_object
from loramux.errors import AdapterInvalid, ConfigError, InvalidRequest
from loramux.wire import BaseDescription

Messages = list[dict[str, Any]]

_QUESTION = {"role": "user", "content": "What is the capital of France?"}
_LONG: Messages = [
    {"role": "system", "content": "Be brief."},
    _QUESTION,
    {"role": "assistant", "content": "Paris."},
    _QUESTION,
]
"""A template may refuse this, but not fail on it; the question alone, after the profile's own
system message, it has to take."""


def problems_of(data: bytes, base: BaseDescription) -> list[str]:
    """Everything that is wrong with a profile."""
    try:
        profile = parse_profile(data, base.vocab_size)
    except AdapterInvalid as error:
        return list(error.problems)
    with closing(Renderer()) as renderer:
        return _try_out(profile, Path(base.directory), renderer)


def companions_of(data: bytes) -> dict[str, str]:
    """The names of the adapters that go with it on other models, of a profile without problems."""
    return parse_profile(data).companions.model_dump(exclude_defaults=True)


def _try_out(profile: Profile, base: Path, renderer: Renderer) -> list[str]:
    config = _tokenizer_config(base)
    own = [{"role": "system", "content": profile.system}] if profile.system else []
    probes: list[Messages] = [[*own, _QUESTION]]
    render: Callable[[Messages, dict[str, Any]], str]
    if profile.chat_template:
        render = partial(renderer.render, profile.chat_template, special_tokens(config))
        probes.append(_LONG)
    elif own and (source := find_template(base, config)):
        try:
            render = ChatTemplate(source, special_tokens(config)).render
        except ConfigError:  # then there are no chats, as the front has said
            return []
    else:
        return []
    for messages in probes:
        try:
            render(messages, {"add_generation_prompt": True})
        except InvalidRequest as error:
            refused = isinstance(error, TemplateRefuses)
            if refused and messages is _LONG:
                continue
            blamed = own and (refused or not profile.chat_template)
            return [f"profile.{'system' if blamed else 'chat_template'}: {error.message}"]
    return []


def _tokenizer_config(base: Path) -> dict[str, Any]:
    """The base's; the front has started with it, so what is wrong with it is not for here."""
    try:
        return parse_object((base / "tokenizer_config.json").read_bytes())
    except (OSError, NotStrictJson):
        return {}
