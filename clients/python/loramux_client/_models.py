"""What the server answers, as typed objects. Fields this client does not know are in ``extra``."""

from __future__ import annotations

import functools
import types
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from loramux_client._errors import InvalidResponseError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One JSON object. ``extra`` holds what it had beyond the fields below."""

    WORDS: ClassVar[frozenset[str]] = frozenset()
    """What may stand in its place."""

    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Raises InvalidResponseError when a field that always comes is missing."""
        if not isinstance(data, dict):
            raise InvalidResponseError(f"expected a {cls.__name__} object in the answer")
        rest = dict(data)
        known = {}
        for name, record in _fields(cls).items():  # type: ignore[arg-type]  # a class is hashable
            if name in rest:
                known[name] = _parse(record, rest.pop(name))
        try:
            return cls(**known, extra=rest)
        except TypeError as exc:
            missing = sorted(_required(cls) - known.keys())
            raise InvalidResponseError(f"{cls.__name__} in the answer lacks {missing}") from exc


def _parse(record: type[Record] | None, value: Any) -> Any:
    if record is None or value is None:
        return value
    if isinstance(value, str) and value in record.WORDS:
        return value
    if isinstance(value, list):
        return [record.from_json(item) for item in value]
    return record.from_json(value)


@functools.cache
def _fields(cls: type[Record]) -> dict[str, type[Record] | None]:
    """Field name -> the Record class it holds (alone, in a list, or None), if it holds one."""
    return {name: _record_in(hint) for name, hint in get_type_hints(cls).items() if name != "extra"}


def _record_in(hint: Any) -> type[Record] | None:
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint
    if get_origin(hint) in (list, types.UnionType, Union):
        return next((found for arg in get_args(hint) if (found := _record_in(arg))), None)
    return None


def _required(cls: type[Record]) -> set[str]:
    return {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}


@dataclass(frozen=True, kw_only=True)
class PromptTokensDetails(Record):
    """``cached_tokens``: prompt tokens the server did not have to compute again."""

    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class CompletionTokensDetails(Record):
    """Tokens that the server guessed ahead: those that are part of the output, and all others."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class SpeculationUsage(Record):
    """How the server guessed ahead, and what came of it: ``steps`` that verified guesses, the
    tokens ``drafted`` for them and those ``accepted``; by drafter the same three. ``heads``: with
    which of them ``medusa`` guessed, "base" or the digest of an adapter's own; None: it was not to
    be asked."""

    WORDS = frozenset({"off"})

    drafters: list[str]
    max_draft_tokens: int = 0
    tree: bool = False
    acceptance: Literal["exact", "typical"] = "exact"
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)
    heads: str | None = None


@dataclass(frozen=True, kw_only=True)
class ByModel(Record):
    """Tokens of the large model and of the small one."""

    large: int = 0
    small: int = 0


@dataclass(frozen=True, kw_only=True)
class EntropyAdaptiveUsage(Record):
    """How the two models took turns: the output ``tokens`` of each, all tokens that each has
    ``computed``, and the large one's share of the output (None when there is none)."""

    threshold: float
    window: int = 0
    min_dwell: int = 0
    start: Literal["small", "large"] = "small"
    tokens: ByModel = ByModel()
    computed: ByModel = ByModel()
    share_large: float | None = None


@dataclass(frozen=True, kw_only=True)
class UsageDetails(Record):
    """``lossless``: the output is what the large model alone would have said."""

    speculation: SpeculationUsage | Literal["off"] = "off"
    lossless: bool = True
    entropy_adaptive: EntropyAdaptiveUsage | None = None


@dataclass(frozen=True, kw_only=True)
class Usage(Record):
    """What a request cost, in tokens. ``completion_tokens_details``: when the server guessed."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    details: UsageDetails | None = None


@dataclass(frozen=True, kw_only=True)
class _Served(Record):
    """``adapter_digest`` is the SHA-256 of the adapter that answered, ``adapter_version`` its
    ``name@generation``; both are None for the base model."""

    id: str
    created: int = 0
    model: str = ""
    object: str = ""
    usage: Usage | None = None
    request_id: str | None = None
    adapter_digest: str | None = None
    adapter_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionChoice(Record):
    """``logprobs`` is OpenAI's object (tokens, token_logprobs, top_logprobs, text_offset)."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion(_Served):
    """The answer to ``complete``. Choices are ordered by prompt, then by choice."""

    choices: list[CompletionChoice]

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True)
class Message(Record):
    """One message of a chat."""

    role: str
    content: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChatChoice(Record):
    """``logprobs`` is OpenAI's object: ``{"content": [...]}``."""

    index: int
    message: Message
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatCompletion(_Served):
    """The answer to ``chat``."""

    choices: list[ChatChoice]

    @property
    def text(self) -> str:
        """The first choice's content."""
        return self.choices[0].message.content or ""


@dataclass(frozen=True, kw_only=True)
class Delta(Record):
    """What a chat chunk adds to a message."""

    role: str | None = None
    content: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkChoice(Record):
    """What one chunk adds to one choice: ``text`` of a completion, ``delta`` of a chat."""

    index: int
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk(Record):
    """One event of a stream. The last may have no choices and only ``usage``, if asked for."""

    id: str
    choices: list[ChunkChoice]
    created: int = 0
    model: str = ""
    object: str = ""
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What this chunk adds, of a completion or a chat. With n > 1 look at ``choices``."""
        if not self.choices:
            return ""
        choice = self.choices[0]
        return (choice.delta.content if choice.delta else choice.text) or ""


@dataclass(frozen=True, kw_only=True)
class Model(Record):
    """A base model, adapter or alias, as ``models`` lists them. An adapter's ``parent`` is its
    base."""

    id: str
    created: int = 0
    object: str = "model"
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter(Record):
    """An adapter on the server.

    ``status``: receiving, validating, ready, failed, deleting or incompatible. ``residency``:
    "pool" when it can be used at once, "disk" when it is loaded on first use. ``report`` is what
    validation found, ``error`` why it failed (code, message, problems). ``profile`` is how it is
    spoken to and speaks; only ``show`` has it, the others have its digest ("" for none).
    ``heads_digest`` is that of Medusa heads of its own ("" for none); ``report`` says what they
    are. ``base`` is the model it is for: target, draft or small. ``companions`` are the adapters
    for the others that its profile names, by model: each ``{"name", "status", "digest"}``, used
    when it is ready. ``created`` and ``expires_at`` (None: never) are Unix seconds. ``faults``
    are requests with it alone that broke, by error code; ``flagged``: too many for an accident.
    """

    name: str
    status: str
    id: str = ""
    object: str = "adapter"
    digest: str = ""
    generation: int = 0
    base: str = "target"
    residency: str = "disk"
    pinned: bool = False
    created: int = 0
    expires_at: int | None = None
    rank: int = 0
    num_bytes: int = 0
    num_frames: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    profile_digest: str = ""
    heads_digest: str = ""
    profile: dict[str, Any] | None = None
    faults: dict[str, int] = field(default_factory=dict)
    flagged: bool = False
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target(Record):
    """One share of an alias. ``model`` is ``name@generation``, or a bare ``name`` when it
    ``follows`` the name to its newest generation. ``digest`` is what answers now: None for the
    base, and for what has gone."""

    model: str
    weight: int = 1
    follows: bool = False
    digest: str | None = None
    status: str = ""


@dataclass(frozen=True, kw_only=True)
class Alias(Record):
    """A name that stands for adapters. ``revision`` counts its changes; ``changed`` is Unix
    seconds."""

    id: str
    revision: int
    targets: list[Target]
    object: str = "alias"
    changed: int = 0


@dataclass(frozen=True, kw_only=True)
class Health(Record):
    """``reasons`` says why the server is not ready; empty when it is."""

    ready: bool
    reasons: list[str] = field(default_factory=list)
