"""What a client may ask: every field of OpenAI's and vLLM's requests, each one with a fate.

A field is implemented (declared below), a label without effect (``LABELS``: accepted, ignored),
known but not implemented (``REFUSED``: only its harmless values pass, anything else is a 400 naming
it), or unknown (ignored and counted; a 400 with ``--strict-fields``). Nothing is clamped and
nothing is converted: ``true`` is no integer, ``"5"`` is no number, NaN is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
)

from loramux.errors import InvalidRequest
from loramux.http.failures import invalid
from loramux.http.speculation import EntropyAdaptiveField, SpeculationField
from loramux.request import SamplingParams

MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_MESSAGES = 4096
MAX_TOKENS = 2**31 - 1
MAX_ADAPTERS = 8
MAX_ADAPTER_SCALE = 100.0

LABELS = frozenset({"metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Field: the values beside null that change nothing, and so are let through."""

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


class Strict(BaseModel):
    """JSON types as they are: no coercion, no NaN, frozen; unknown keys are counted elsewhere."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def parse(cls, body: dict[str, Any], *, strict: bool, ignored: Callable[[int], None]) -> Self:
        """``body`` checked; unknown fields are told to ``ignored``, or refused when ``strict``.

        Raises InvalidRequest naming the first field that is wrong.
        """
        unknown = body.keys() - cls.model_fields.keys() - cls.REFUSED.keys() - LABELS
        if unknown and strict:
            name = min(unknown)[:64]
            raise InvalidRequest(f"{name}: no such field", param=name)
        if unknown:
            ignored(len(unknown))
        for name in cls.REFUSED.keys() & body.keys():
            value = body[name]
            if value is not None and not any(_same(value, ok) for ok in cls.REFUSED[name]):
                raise InvalidRequest(f"{name} is not supported by this server", param=name)
        try:
            parsed = cls.model_validate(body)
        except ValidationError as exc:
            raise invalid(exc.errors(include_input=False, include_context=False)) from None
        parsed.check()
        return parsed

    def check(self) -> None:
        """Rules between fields; raises InvalidRequest."""


def _same(value: Any, harmless: Any) -> bool:
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def _stops(value: Any) -> Any:
    """``stop`` as a list, whichever way it was written."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings")
    if not all(0 < len(item) <= MAX_STOP_CHARS for item in stops):
        raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
    return stops


def _prompts(value: Any) -> Any:
    """``prompt`` as a list of texts or of token-id lists; by hand: there may be a million ids."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a non-empty string or list")
    if all(type(item) is int for item in value):
        value = [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    texts = all(isinstance(item, str) for item in value)
    ids = all(isinstance(item, list) and all(type(i) is int for i in item) for item in value)
    if not texts and not ids:
        raise ValueError("must be text, token ids, or a list of one of them")
    if not all(value):
        raise ValueError("a prompt must not be empty")
    return value


def _one_text(value: Any) -> Any:
    """Message content as one text; parts are joined as vLLM does, media parts are refused."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only text parts are supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part needs a text")
    return "\n".join(part["text"] for part in value)


Flag = bool | None
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None


class StreamOptions(Strict):
    """``stream_options``: the usage chunk, and as vLLM has it, counts so far in every chunk."""

    include_usage: Flag = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Flag = None


MAX_DEADLINE_S = 7 * 86400
Scale = Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]


class AdapterChoice(Strict):
    """One of several adapters that a request wears at once."""

    id: str
    scale: Scale = 1.0


class Sampling(Strict):
    """What completions and chat have in common."""

    model: str
    adapter_id: str | None = None
    scale: Scale | None = None
    adapters: (
        Annotated[list[AdapterChoice], Field(min_length=1, max_length=MAX_ADAPTERS)] | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: Annotated[
        list[str], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)
    ] = []
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None
    ) = None
    ignore_eos: Flag = None
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    add_special_tokens: Flag = None
    return_token_ids: Flag = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    speculation: SpeculationField = None
    entropy_adaptive: EntropyAdaptiveField = None
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    """Seconds from the request's arrival after which nobody wants the rest: it ends with a 504."""
    user: str | None = None
    """Whose request it is: of an alias with shares, one user always gets the same."""

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(_TOKEN_ID.fullmatch(key) for key in value):
            raise ValueError("keys must be token ids")
        return value

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream", param="stream_options")
        if self.continuous_usage and not self.include_usage:
            raise InvalidRequest(
                "stream_options: continuous_usage_stats needs include_usage", param="stream_options"
            )
        if self.adapters is not None and self.adapter_id is not None:
            raise InvalidRequest("give adapters or adapter_id, not both", param="adapters")
        if self.adapters is not None and self.scale is not None:
            raise InvalidRequest("with adapters, each entry has its own scale", param="scale")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequest when a token id is not one of the model's."""
        if any(int(key) >= vocab_size for key in self.logit_bias or ()):
            raise InvalidRequest("logit_bias: no such token id", param="logit_bias")
        if any(token_id >= vocab_size for token_id in self.stop_token_ids or ()):
            raise InvalidRequest("stop_token_ids: no such token id", param="stop_token_ids")

    def sampling(
        self,
        *,
        seed: int,
        choice: int,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The same wishes with nothing left to default."""
        stop_ids = dict.fromkeys(
            (*(self.stop_token_ids or ()), *(() if self.ignore_eos else eos_ids))
        )
        return SamplingParams(
            seed=seed,
            choice=choice,
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, self.top_k or 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(stop_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_REFUSED_EVERYWHERE, "suffix": ("",)}

    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Flag = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def output_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens may be 0 only with echo", param="max_tokens")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest("best_of must equal n: nothing is ranked", param="best_of")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise InvalidRequest("min_tokens exceeds max_tokens", param="min_tokens")


class ChatMessage(Strict):
    """One message. Tool calls have nowhere to go yet, so a message with them is refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_one_text)]
    name: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None

    def plain(self) -> dict[str, Any]:
        """What the chat template sees."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content, **named}


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_REFUSED_EVERYWHERE,
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count = None
    max_completion_tokens: Count = None
    logprobs: Flag = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: Flag = None

    @property
    def output_limit(self) -> int | None:
        """None: as much as the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_tokens != self.output_limit:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens disagree", param="max_completion_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs", param="top_logprobs")
        if self.output_limit is not None and (self.min_tokens or 0) > self.output_limit:
            raise InvalidRequest("min_tokens exceeds max_tokens", param="min_tokens")


class TokenizeRequest(Strict):
    """``POST /tokenize``: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    add_special_tokens: Flag = None
    add_generation_prompt: Flag = None
    return_token_strs: Flag = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
