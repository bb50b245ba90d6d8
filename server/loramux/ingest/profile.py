"""An adapter's profile, tried out before anybody talks to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux.adapters.chat_template import TemplateRefuses, find_template, special_tokens
from loramux.adapters.profile import Profile, parse_profile
from loramux.adapters.renderer import Renderer
from loramux.adapters.strict_json import NotStrictJson, parse_object
from loramux.errors import AdapterInvalid, InvalidRequest
from loramux.wire import BaseDescription

_SYSTEM = {"role": "system", "content": "Be brief."}
_QUESTION = {"role": "user", "content": "What is the capital of France?"}
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [_QUESTION],
    [_SYSTEM, _QUESTION, {"role": "assistant", "content": "Paris."}, _QUESTION],
)
"""The first every template has to take; the second it may refuse, but not fail on."""


def problems_of(data: bytes, base: BaseDescription) -> list[str]:
    """Everything that is wrong with a profile."""
    try:
        profile = parse_profile(data, base.vocab_size)
    except AdapterInvalid as error:
        return list(error.problems)
    renderer = Renderer()
    try:
        return _try_out(profile, Path(base.directory), renderer)
    finally:
        renderer.close()


def _try_out(profile: Profile, base: Path, renderer: Renderer) -> list[str]:
    config = _tokenizer_config(base)
    source, field = profile.chat_template, "chat_template"
    if not source:
        # The base's template works; what is asked is whether it takes the adapter's system message.
        if not profile.system or not (source := find_template(base, config) or ""):
            return []
        field = "system"
    own = [{**_SYSTEM, "content": profile.system}] if profile.system else []
    for number, messages in enumerate(_PROBES):
        probe = messages if messages[0] is _SYSTEM else [*own, *messages]
        variables = {"add_generation_prompt": True}
        try:
            renderer.render(source, special_tokens(config), probe, variables)
        except TemplateRefuses as error:
            if number == 0:
                return [f"profile.{'system' if own else field}: {error.message}"]
        except InvalidRequest as error:
            if field == "chat_template" or number == 0:
                return [f"profile.{field}: {error.message}"]
    return []


def _tokenizer_config(base: Path) -> dict[str, Any]:
    """The base's; the front has started with it, so what is wrong with it is not for here."""
    try:
        return parse_object((base / "tokenizer_config.json").read_bytes())
    except (OSError, NotStrictJson):
        return {}
