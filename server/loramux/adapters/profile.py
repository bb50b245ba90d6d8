"""What an adapter brings besides its weights: how it is spoken to, and how it speaks by default.

A profile is one JSON object. It is stored in one spelling (sorted keys, no spaces, UTF-8), and its
bytes are part of the adapter's identity: the same weights that speak otherwise are another version.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loramux.adapters.problems import Problems
from loramux.adapters.strict_json import NotStrictJson, parse_object, shown
from loramux.config import ADAPTER_NAME
from loramux.errors import InvalidRequest, PayloadTooLarge

MAX_PROFILE_BYTES = 64 << 10
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 128
MAX_TOKENS = 2**31 - 1
_TYPED = {"missing": "this field is required", "extra_forbidden": "no such field"}

Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)]
Name = Annotated[str, Field(pattern=f"^(?:{ADAPTER_NAME.pattern})\\z")]


class _Object(BaseModel):
    """JSON types as they are; null is no way to say "not set"."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True
    )


class Defaults(_Object):
    """What a request says that leaves these fields out; the ranges are the requests' own."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 16

    @property
    def given(self) -> dict[str, float]:
        """Those that the profile names."""
        return self.model_dump(exclude_unset=True)


class Companions(_Object):
    """Names of adapters that go with this one: for its drafts, and for a smaller base."""

    draft: Name = ""
    small: Name = ""


class Profile(_Object):
    """``eos_token_id`` stands in for the base's; ``stop`` and ``stop_token_ids`` are added to what
    a request brings; ``system`` begins a chat that has no system message of its own."""

    chat_template: Text = ""
    system: Text = ""
    generation: Defaults = Defaults()
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: TokenIds = []
    eos_token_id: Annotated[
        TokenIds, BeforeValidator(lambda value: [value] if type(value) is int else value)
    ] = []
    companions: Companions = Companions()


def spell(profile: bytes | dict[str, Any]) -> bytes:
    """The bytes that are stored of a profile; b"" of an empty one, which is none.

    Raises InvalidRequest when it is not one plain JSON object, and PayloadTooLarge.
    """
    try:
        value = parse_object(profile) if isinstance(profile, bytes) else profile
        if not value:
            return b""
        text = json.dumps(
            value, allow_nan=False, ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
        data = text.encode()
    except NotStrictJson as error:
        raise InvalidRequest(f"profile: {error}", param="profile") from None
    except (ValueError, RecursionError):  # infinity, half a character, brackets without end
        raise InvalidRequest("profile: not a plain JSON object", param="profile") from None
    if len(data) > MAX_PROFILE_BYTES:
        raise PayloadTooLarge(f"profile: exceeds {MAX_PROFILE_BYTES} bytes", param="profile")
    return data


def parse_profile(data: bytes, vocab_size: int = 0) -> Profile:
    """The profile that ``spell`` wrote. Raises AdapterInvalid listing every field that is wrong.

    ``vocab_size`` 0: not known, any token id will do.
    """
    problems = Problems()
    try:
        profile = Profile.model_validate(parse_object(data))
    except ValidationError as error:
        for found in error.errors(include_input=False, include_url=False, include_context=False):
            text = _TYPED.get(found["type"], found["msg"])
            problems.add(f"{_path(found['loc'])}: {text[:1].lower()}{text[1:]}")
        problems.raise_any()
        raise
    for name in ("stop_token_ids", "eos_token_id"):
        for index, token_id in enumerate(getattr(profile, name)):
            if vocab_size and token_id >= vocab_size:
                problems.add(f"profile.{name}[{index}]: the base has token ids below {vocab_size}")
    problems.raise_any()
    return profile


def _path(parts: tuple[int | str, ...]) -> str:
    path = "profile"
    for part in parts:
        named = isinstance(part, str)
        path += f".{part if str(part).isidentifier() else shown(part)}" if named else f"[{part}]"
    return path[:200]
