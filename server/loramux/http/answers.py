"""What a client gets: OpenAI's objects field by field, with vLLM's extra fields where asked for.

Structs and not models of the requests' kind: a streamed token is encoded thousands of times a
second, and msgspec does it in a microsecond. ``UNSET`` fields do not appear in the JSON at all.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

encode = msgspec.json.Encoder().encode


class PromptDetails(msgspec.Struct):
    """``cached_tokens``: prompt tokens that came out of the prefix cache."""

    cached_tokens: int


class PredictionDetails(msgspec.Struct):
    """Guessed tokens: those that are part of the output, and all others."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class DrafterUsage(msgspec.Struct):
    """``steps`` that verified guesses, the tokens guessed for them, and those in the output."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class SpeculationUsage(msgspec.Struct):
    """Guessing ahead as it was resolved, and what came of it. ``heads`` are those that ``medusa``
    guessed with, where it could: "base", or the digest of an adapter's own."""

    drafters: tuple[str, ...]
    max_draft_tokens: int
    tree: bool
    acceptance: Literal["exact", "typical"]
    steps: int
    drafted: int
    accepted: int
    by_drafter: dict[str, DrafterUsage]
    heads: str | UnsetType = UNSET


class ByModel(msgspec.Struct):
    """Tokens of the large model and of the small one."""

    large: int
    small: int


class EntropyAdaptiveUsage(msgspec.Struct):
    """Entropy-adaptive decoding as it was resolved; the output ``tokens`` of each model, those each
    has ``computed`` (prompts and catching up included), and the large one's share of the output."""

    threshold: float
    window: int
    min_dwell: int
    start: Literal["small", "large"]
    tokens: ByModel
    computed: ByModel
    share_large: float | None


class UsageDetails(msgspec.Struct):
    """``lossless``: the output is what the large model alone would have said."""

    speculation: Literal["off"] | SpeculationUsage
    lossless: bool
    entropy_adaptive: EntropyAdaptiveUsage | UnsetType = UNSET


class Usage(msgspec.Struct):
    """Tokens: every prompt once, every choice's output."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: PredictionDetails | UnsetType
    details: UsageDetails


class UsageSoFar(msgspec.Struct):
    """Tokens of one choice up to a chunk of its stream, and of its prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry per token; None where the first prompt token has no probability."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class CompletionChoice(msgspec.Struct):
    """One choice, or in a stream the newest piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer of /v1/completions, and each chunk of its stream: OpenAI uses one shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UsageSoFar | None | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(msgspec.Struct):
    """``bytes`` is there because ``token`` cannot hold half a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """One output token and its likeliest rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """``refusal`` is always null: there are no refusals."""

    content: list[ChatLogprob]
    refusal: None = None


class Message(msgspec.Struct):
    """The assistant's answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One whole choice of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class MessageDelta(msgspec.Struct):
    """The first has the role, the middle ones text, the last nothing."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """The newest piece of one choice."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a streamed chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UsageSoFar | None | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ModelCard(msgspec.Struct):
    """An entry of /v1/models. ``parent`` is the base an adapter belongs to, null for the base."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: str = "loramux"
