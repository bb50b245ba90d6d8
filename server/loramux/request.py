"""The vocabulary of a request: what to sample, with which adapters, and how it ended."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort"]
"""``stop``: EOS, a stop token or a stop string. ``length``: max_tokens or the context. ``abort``:
the client left or an operator asked."""

BASE_MODEL_ID = 0
"""``model_id`` of the target model; a draft or partner model gets its own number."""


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One adapter of a request: its content digest (64 lower-case hex) and the request's scale."""

    digest: str
    scale: float = 1.0


Adapters = tuple[AdapterRef, ...]
"""The ordered adapter list of a request. The base model is the empty one."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one choice of one request picks its tokens; everything resolved, nothing left to default.

    The fields mean what OpenAI and vLLM mean by them. ``seed`` is always set: the front draws one
    when the client gives none. ``stop_token_ids`` already holds the model's EOS ids unless the
    client asked to ignore them. ``logprobs``: how many alternatives per token (0: only the chosen
    one's), None for no log-probabilities at all; ``prompt_logprobs`` likewise for the prompt.
    """

    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
