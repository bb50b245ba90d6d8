"""What one can ask a server, each as a flow: signature, request and answer of every verb, once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from loramux_client import _compress
from loramux_client._compress import Compressed
from loramux_client._errors import RequestTimeoutError, api_error
from loramux_client._files import Progress, local_file
from loramux_client._models import (
    Adapter,
    Alias,
    ChatCompletion,
    Completion,
    Health,
    Model,
    Record,
)
from loramux_client._profile import Choice, profile_of
from loramux_client._protocol import Answer, Flow, Request, Sleep, identity, json_request
from loramux_client._sending import send
from loramux_client._sources import AnySource, open_adapter

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages = Sequence[Mapping[str, Any]]
R = TypeVar("R", bound=Record)

LONGEST_WAIT_S = 600.0
FIRST_POLL_S = 0.05
LONGEST_POLL_S = 1.0


class Speculation(TypedDict, total=False):
    """Who guesses ahead (all that the server has), how many tokens at most in a step (8), and
    whether guesses may branch. ``acceptance`` "typical" changes the output."""

    drafters: Sequence[str]
    max_draft_tokens: int
    tree: bool
    acceptance: Literal["exact", "typical"]


class EntropyAdaptive(TypedDict, total=False):
    """The large model takes over while the mean entropy of the last ``window`` (5) distributions is
    above ``threshold`` bits, the small one otherwise, each for ``min_dwell`` (8) tokens or more."""

    threshold: Required[float]
    window: int
    min_dwell: int
    start: Literal["small", "large"]


class Options(TypedDict, total=False):
    """What completions and chats have in common. What is left out is the server's default."""

    adapter_id: str | None
    max_tokens: int | None
    min_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    return_token_ids: bool
    cache_salt: str | None
    speculation: Literal["auto", "off"] | Speculation | None
    entropy_adaptive: EntropyAdaptive | None
    user: str
    deadline_s: float | None


class CompletionOptions(Options, total=False):
    """``logprobs``: how many alternatives per token."""

    logprobs: int | None
    echo: bool
    stream_options: Mapping[str, Any] | None


class ChatOptions(Options, total=False):
    """``logprobs``: whether; ``top_logprobs``: how many alternatives per token."""

    logprobs: bool
    top_logprobs: int
    max_completion_tokens: int | None
    stream_options: Mapping[str, Any] | None


class StreamOptions(Options, total=False):
    """Those of a completion with a prompt, those of a chat with messages."""

    logprobs: int | bool | None
    echo: bool
    top_logprobs: int
    max_completion_tokens: int | None
    stream_options: Mapping[str, Any] | None


class BlendFields(TypedDict, total=False):
    """What recipes read: ``rank`` of the result; ``density``: the share of values that stays;
    ``majority_sign_method``: total or frequency; ``seed``: which values; ``alpha``, ``beta``: the
    scale of the first block, and how much is added up to the last."""

    rank: int
    density: float
    majority_sign_method: str
    seed: int
    alpha: float
    beta: float


def complete(
    prompt: Prompt, *, model: str, **options: Unpack[CompletionOptions]
) -> Flow[Completion]:
    """Continue a text, token ids, or a list of either, with the base or an adapter (``model``)."""
    answer: Answer = yield _generate({"prompt": prompt, "model": model}, options)
    return _served(Completion, answer)


def chat(messages: Messages, *, model: str, **options: Unpack[ChatOptions]) -> Flow[ChatCompletion]:
    """Answer a conversation: ``[{"role": "user", "content": "..."}]``."""
    answer: Answer = yield _generate({"messages": messages, "model": model}, options)
    return _served(ChatCompletion, answer)


def stream(
    prompt: Prompt | None = None,
    *,
    messages: Messages | None = None,
    model: str,
    **options: Unpack[StreamOptions],
) -> Flow[Answer]:
    """Like ``complete`` (with a prompt) or ``chat`` (with messages), piece by piece.

    Use it in a ``with`` block and iterate over it; leaving the block early stops the generation.
    """
    if (prompt is None) == (messages is None):
        raise TypeError("stream() takes a prompt or messages")
    text = {"prompt": prompt} if messages is None else {"messages": messages}
    request = _generate({**text, "model": model}, options, stream=True)
    answer: Answer = yield request
    return answer


def models() -> Flow[list[Model]]:
    """The base model and every adapter and alias that can be named in ``model``."""
    answer: Answer = yield Request("GET", "/v1/models")
    return _listed(Model, answer)


def health() -> Flow[Health]:
    """Whether the server takes requests, and if not why. Never tried again."""
    accept = frozenset({503})
    answer: Answer = yield Request("GET", "/health/ready", retry=False, accept=accept)
    return Health.from_json({**answer.json(), "ready": answer.status == 200})


class Compression(TypedDict, total=False):
    """How ``push`` compresses: the share of values that stay, and what they are scaled by (1)."""

    density: Required[float]
    alpha: float


def compress(source: AnySource, density: float, alpha: float = 1.0) -> Compressed:
    """Compress a LoRA adapter (ComPEFT): see ``Compressed`` for what it did, and push that.

    ``density``: the share of its values that are kept, above 0, at most 1; their size is ``alpha``
    standard deviations of all of them. Raises AdapterFilesError for what is not LoRA.
    """
    with open_adapter(source) as files:
        return _compress.compress(files, density, alpha)


def push(
    source: AnySource,
    name: str | None = None,
    *,
    base: Literal["target", "draft", "small"] = "target",
    expected_generation: int | None = None,
    ttl_s: int | None = None,
    compress: Compression | None = None,
    profile: Choice = True,
    heads: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
    wait: bool | float = True,
) -> Flow[Adapter]:
    """Upload a PEFT adapter: a folder, a tar or zip of one, (config path, weights path), a PEFT
    model in memory, ``hf:org/repo`` on the Hugging Face hub (extra ``hub``), or what ``compress``
    gave.

    ``name`` is that of the folder, archive or repository if not given. ``base``: which of the
    server's models it is for; one for the draft or the small model is asked for by no request, but
    named among the ``companions`` of another's profile, and has neither profile nor heads itself.
    ``compress``: send it compressed, ``{"density": 0.1}``; ``report`` of the answer says what that
    did. A name that holds other weights is only given these when ``expected_generation`` is its
    present one. Files that the server has are not sent again, large ones are resumed after a broken
    connection. ``progress(sent, total)`` counts bytes.

    ``profile``: how it is spoken to and speaks, as an object or the path of a JSON file; True takes
    it from the chat template, generation_config.json and loramux.json in the folder, False sends
    none. ``heads``: the path of Medusa heads of its own, which guess what it says next; True takes
    medusa_heads.safetensors from the folder, False sends none. ``ttl_s``: seconds until it is
    deleted. ``wait``: until the server has validated it (seconds, or True for ten minutes), else
    return at once with status "validating". Raises AdapterInvalidError with all its problems.
    """
    with open_adapter(source) as files:
        name = name or files.name
        if not name:
            raise TypeError("push() of a model in memory needs a name")
        voice = profile_of(files, profile if base == "target" or profile is not True else False)
        if compress is not None:
            files = _compress.compress(files, **compress).files
        if not isinstance(heads, bool):
            files = replace(files, heads=local_file(Path(heads)))
        elif not heads or base != "target":
            files = replace(files, heads=None)
        fields = yield from send(files, progress)
    if voice:
        fields["profile"] = voice
    fields["name"] = name
    if base != "target":
        fields["base"] = base
    if expected_generation is not None:
        fields["expected_generation"] = expected_generation
    if ttl_s is not None:
        fields["ttl_s"] = ttl_s
    return (yield from _register(fields, wait))


def _register(fields: Mapping[str, Any], wait: bool | float) -> Flow[Adapter]:
    answer: Answer = yield json_request("POST", "/v1/adapters", fields)
    adapter = Adapter.from_json(answer.json())
    deadline = time.monotonic() + (LONGEST_WAIT_S if wait is True else wait)
    pause = FIRST_POLL_S
    while wait and adapter.status in ("receiving", "validating"):
        if time.monotonic() >= deadline:
            raise RequestTimeoutError(f"adapter {adapter.name!r} is still {adapter.status}")
        yield Sleep(pause)
        pause = min(2 * pause, LONGEST_POLL_S)
        # By generation: the name alone may still mean the one before.
        adapter = yield from show(f"{adapter.name}@{adapter.generation}")
    if wait and adapter.status == "failed":
        raise api_error({"code": "adapter_invalid", **(adapter.error or {})})
    return adapter


def blend(
    name: str,
    *,
    method: str,
    sources: Sequence[str | tuple[str, float]],
    expected_generation: int | None = None,
    wait: bool | float = True,
    **fields: Unpack[BlendFields],
) -> Flow[Adapter]:
    """Make an adapter of others on the server: soup, ties, dare_ties, dare_linear, scale_layers or
    compress.

    ``sources`` are names, or (name, weight). The server computes the whole blend before it answers:
    give the client a long ``timeout`` for a large one. ``expected_generation`` and ``wait`` as for
    ``push``. Raises AdapterInvalidError when the sources cannot be blended so.
    """
    listed = [
        {"id": source} if isinstance(source, str) else {"id": source[0], "weight": source[1]}
        for source in sources
    ]
    body: dict[str, Any] = {
        "name": name,
        "blend": {"method": method, "sources": listed, **fields},
    }
    if expected_generation is not None:
        body["expected_generation"] = expected_generation
    return (yield from _register(body, wait))


def list_adapters() -> Flow[list[Adapter]]:
    """Every adapter on the server, whatever its status."""
    answer: Answer = yield Request("GET", "/v1/adapters")
    return _listed(Adapter, answer)


def show(name: str) -> Flow[Adapter]:
    """One adapter: its status, size, and whether it is in memory now."""
    answer: Answer = yield Request("GET", _adapter_path(name))
    return Adapter.from_json(answer.json())


def delete(name: str) -> Flow[None]:
    """Remove an adapter, or one generation of it (``name@generation``). Requests that run with it
    go on to their end."""
    yield Request("DELETE", _adapter_path(name))


def pin(name: str) -> Flow[Adapter]:
    """Keep an adapter in memory until it is unpinned."""
    answer: Answer = yield Request("PUT", f"{_adapter_path(name)}/pin")
    return Adapter.from_json(answer.json())


def unpin(name: str) -> Flow[Adapter]:
    """Let an adapter's memory be used for others again."""
    answer: Answer = yield Request("DELETE", f"{_adapter_path(name)}/pin")
    return Adapter.from_json(answer.json())


def versions(name: str) -> Flow[list[Adapter]]:
    """Every generation of an adapter, newest first."""
    answer: Answer = yield Request("GET", f"{_adapter_path(name)}/versions")
    return _listed(Adapter, answer)


def set_ttl(name: str, ttl_s: int | None) -> Flow[Adapter]:
    """Have an adapter deleted in so many seconds, or keep it (None). A bare name means its newest
    generation. What an alias stands for stays until the alias moves."""
    answer: Answer = yield json_request("PUT", f"{_adapter_path(name)}/ttl", {"ttl_s": ttl_s})
    return Adapter.from_json(answer.json())


def set_alias(
    name: str, target: str | Mapping[str, int], *, expected_revision: int | None = None
) -> Flow[Alias]:
    """Point an alias at an adapter, or at several: ``{model: weight}``. All at once, or not at all.

    ``model@generation`` stays that generation, a bare name follows its newest; the base's name is
    the base. One ``user`` of completions gets the same target while the weights stay. The alias is
    only changed when its revision is ``expected_revision`` (0: when there is none), if given.
    """
    fields: dict[str, Any] = {"target": target}
    if not isinstance(target, str):
        fields = {"targets": [{"model": m, "weight": weight} for m, weight in target.items()]}
    if expected_revision is not None:
        fields["expected_revision"] = expected_revision
    answer: Answer = yield json_request("PUT", _alias_path(name), fields)
    return Alias.from_json(answer.json())


def list_aliases() -> Flow[list[Alias]]:
    """Every alias on the server."""
    answer: Answer = yield Request("GET", "/v1/aliases")
    return _listed(Alias, answer)


def show_alias(name: str) -> Flow[Alias]:
    """What an alias stands for."""
    answer: Answer = yield Request("GET", _alias_path(name))
    return Alias.from_json(answer.json())


def delete_alias(name: str) -> Flow[None]:
    """Remove an alias. The adapters it stood for stay."""
    yield Request("DELETE", _alias_path(name))


def _generate(
    fields: Mapping[str, Any], options: Mapping[str, Any], *, stream: bool = False
) -> Request:
    if "stream" in options:
        raise TypeError("use stream() to stream")
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    return json_request("POST", path, {**fields, **options, "stream": stream}, stream=stream)


def _served(cls: type[R], answer: Answer) -> R:
    request_id, digest, version = identity(answer)
    about = {"request_id": request_id, "adapter_digest": digest, "adapter_version": version}
    return cls.from_json({**answer.json(), **about})


def _listed(cls: type[R], answer: Answer) -> list[R]:
    return [cls.from_json(item) for item in answer.json().get("data", ())]


def _adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _alias_path(name: str) -> str:
    return f"/v1/aliases/{quote(name, safe='')}"
