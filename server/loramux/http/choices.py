"""One HTTP request becomes n choices of each of its prompts, and they become one answer again."""

from __future__ import annotations

import asyncio
import re
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from loramux.errors import ContextLengthExceeded, InvalidRequest, Overloaded, RequestTooLarge
from loramux.front.admission import Admission, Claim, estimate
from loramux.front.catalog import Served
from loramux.front.front import Front
from loramux.front.generation import Delta, Done, Generation, GenerationSpec
from loramux.front.voices import Voice
from loramux.http.answers import PromptDetails, Usage, UsageSoFar
from loramux.http.schemas import AdapterChoice, Sampling
from loramux.http.speculation import (
    entropy_of,
    heads_of,
    predictions,
    speculation_of,
    usage_details,
)
from loramux.request import AdapterRef, Adapters, EntropyAdaptive, Speculation
from loramux.wire import Ready

Body = TypeVar("Body", bound=Sampling)

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}")
"""What could be a model's name at all; anything else is a 400 and not a 404."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, and its text where the answer repeats it."""

    ids: list[int]
    text: str = ""


def resolve(front: Front, body: Sampling, tenant: str) -> Served:
    """What the request's ``model``, ``adapter_id`` or ``adapters`` mean to the tenant now.

    Raises InvalidRequest for what can be no name or does not go together, else what
    AdapterService.resolve raises.
    """
    served = named(front, "model", body.model, tenant, body.user)
    if body.adapters is not None:
        return _several(front, served, body, body.adapters, tenant)
    if body.adapter_id is not None:
        if body.model not in (front.base_name, body.adapter_id):
            raise InvalidRequest(
                "adapter_id: give it beside the base model's name only", param="adapter_id"
            )
        served = named(front, "adapter_id", body.adapter_id, tenant, body.user)
    if body.scale is None:
        return served
    if served.name == front.base_name:
        raise InvalidRequest("scale: the base model has no adapter to scale", param="scale")
    return replace(served, adapters=_scaled(served, body.scale))


def named(front: Front, param: str, name: str, tenant: str, user: str | None = None) -> Served:
    """What one name means; ``param`` is the field that holds it."""
    if name != front.base_name and not _MODEL.fullmatch(name):
        raise InvalidRequest(f"{param}: not a valid model name", param=param)
    return front.adapters.resolve(name, tenant=tenant, user=user)


def _several(
    front: Front, base: Served, body: Sampling, choices: Sequence[AdapterChoice], tenant: str
) -> Served:
    """All of ``choices`` at once, beside the base's name."""
    if base.name != front.base_name:
        raise InvalidRequest("adapters: give them beside the base model's name only", param="model")
    adapters: Adapters = ()
    profiles: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    for index, choice in enumerate(choices):
        param = f"adapters[{index}].id"
        served = named(front, param, choice.id, tenant, body.user)
        if served.name == front.base_name:
            raise InvalidRequest(f"{param}: the base model is no adapter", param=param)
        if len(choices) > 1 and not served.combines:
            raise InvalidRequest(
                f"{param}: {choice.id!r} scales what modules read, so it stands alone", param=param
            )
        adapters += _scaled(served, choice.scale)
        profiles += served.profiles
        heads += served.heads
        versions += served.versions
    companions = served.companions if len(choices) == 1 else {}
    return replace(
        base,
        adapters=adapters,
        profiles=profiles,
        heads=heads,
        versions=versions,
        companions=companions,
    )


def _scaled(served: Served, scale: float) -> Adapters:
    # The kernels' scale: what equals it there is the same list, and shares its prefix cache. An
    # alias may stand for the base: no adapter, nothing to scale.
    kernels = struct.unpack("f", struct.pack("f", scale))[0]
    return tuple(AdapterRef(ref.digest, kernels) for ref in served.adapters)


def speaking(body: Body, voice: Voice) -> Body:
    """``body`` as the adapters would have it: their defaults where it says nothing (or null), and
    what ends their texts besides what ends its own."""
    update: dict[str, Any] = {
        name: value for name, value in voice.defaults.items() if getattr(body, name) is None
    }
    if voice.stop:
        update["stop"] = list(dict.fromkeys((*body.stop, *voice.stop)))
    if voice.stop_token_ids:
        own = body.stop_token_ids or ()
        update["stop_token_ids"] = list(dict.fromkeys((*own, *voice.stop_token_ids)))
    return body.model_copy(update=update) if update else body


def engine_of(front: Front) -> Ready:
    """What the engine says of itself. Raises Overloaded when there is none to say."""
    if front.info is None:
        raise Overloaded("the engine is starting", code="engine_starting")
    return front.info


def room_for(
    front: Front,
    prompt: Prompt,
    max_tokens: int | None,
    *,
    tenant: str,
    param: str,
    most: int | None = None,
) -> int:
    """How many tokens to make after ``prompt``: ``max_tokens``, or when it is None all that fit, of
    which ``most`` are enough.

    Raises ContextLengthExceeded when they do not fit, RequestTooLarge when they do not fit the
    tenant's share of the pool, and InvalidRequest for ids that are no tokens of the model.
    """
    info = engine_of(front)
    limit = info.max_model_len
    num = len(prompt.ids)
    wanted = 1 if max_tokens is None else max_tokens
    if num + wanted > limit:
        raise ContextLengthExceeded(
            f"{num} prompt tokens and {wanted} output tokens exceed the context of {limit} tokens",
            param=param,
        )
    if min(prompt.ids) < 0 or max(prompt.ids) >= front.tokenizer.vocab_size:
        raise InvalidRequest(f"{param}: no such token id", param=param)
    share = front.quotas.pool_tokens(tenant, info)
    if share is not None and num + wanted > share:
        raise RequestTooLarge(
            f"{num} prompt tokens and {wanted} output tokens exceed this tenant's share of the "
            f"memory pool, {share} tokens",
            param="max_tokens" if num < share else param,
        )
    if max_tokens is not None:
        return max_tokens
    limit = limit if share is None else min(limit, share)
    return limit - num if most is None else min(limit - num, most)


def admit(
    front: Front,
    body: Sampling,
    served: Served,
    tenant: str,
    prompts: Sequence[str | list[int]],
    max_tokens: int | None,
) -> Admission:
    """Room for the request's choices, before its prompts are tokenized; ``max_tokens`` None: all
    that fit. Raises as Front.admit does."""
    context = 0 if front.info is None else front.info.max_model_len
    # One that is too long for the context is refused once its tokens are known.
    estimates = [min(estimate(prompt), context) for prompt in prompts]
    known = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
    output = context if max_tokens is None else max(1, max_tokens)
    num = len(prompts) * body.num_choices
    return front.admit(
        Claim(
            choices=num,
            tenant=tenant,
            adapters=served.adapters,
            prompt_tokens=body.num_choices * sum(estimates),
            output_tokens=min(output, context),
            certain=body.num_choices * known + (0 if max_tokens is None else num * output),
        )
    )


class Choices:
    """The running choices of one request, numbered prompt by prompt as OpenAI does."""

    def __init__(
        self,
        front: Front,
        body: Sampling,
        served: Served,
        voice: Voice,
        prompts: Sequence[Prompt],
        kind: str,
        *,
        tenant: str,
    ) -> None:
        self.id = f"{kind}-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.prompts = prompts
        self.n = body.num_choices
        self.generations: list[Generation] = []
        self._front, self._body, self._served = front, body, served
        self._eos_ids = voice.eos_ids
        self._tenant = tenant
        self._speculation: Speculation | None = None
        self._entropy: EntropyAdaptive | None = None
        self._made: dict[int, int] = {}

    def submit(
        self,
        max_tokens: Sequence[int],
        *,
        logprobs: int | None,
        prompt_logprobs: int | None,
        arrived_at: float,
    ) -> None:
        """Hands every choice to the engine; if one is refused, none stays. Raises what
        ``Front.submit`` raises.

        Without a seed each prompt draws its own, else equal prompts would get equal answers.
        """
        body, front = self._body, self._front
        body.check_vocabulary(front.tokenizer.vocab_size)
        if (body.min_tokens or 0) > min(max_tokens):
            raise InvalidRequest("min_tokens exceeds max_tokens", param="min_tokens")
        info = engine_of(front)
        default, heads = front.config.speculation, heads_of(self._served)
        self._speculation = speculation_of(body.speculation, default, info, heads)
        self._entropy = entropy_of(body.entropy_adaptive, self._served, info)
        try:
            for number, prompt in enumerate(self.prompts):
                seed = secrets.randbits(63) if body.seed is None else body.seed
                for choice in range(self.n):
                    spec = GenerationSpec(
                        request_id=f"{self.id}-{number * self.n + choice}",
                        adapters=self._served.adapters,
                        tenant=self._tenant,
                        prompt_ids=prompt.ids,
                        sampling=body.sampling(
                            seed=seed,
                            choice=choice,
                            max_tokens=max_tokens[number],
                            eos_ids=self._eos_ids,
                            logprobs=logprobs,
                            prompt_logprobs=prompt_logprobs,
                        ),
                        speculation=self._speculation,
                        entropy=self._entropy,
                        companions=self._served.companions,
                        stop=tuple(body.stop),
                        include_stop=bool(body.include_stop_str_in_output),
                        skip_special_tokens=body.skip_special_tokens is not False,
                        cache_salt=body.cache_salt or "",
                        deadline_s=body.deadline_s,
                        arrived_at=arrived_at,
                    )
                    self.generations.append(front.submit(spec))
        except BaseException:
            self.cancel()
            raise

    def headers(self) -> dict[str, str]:
        """``x-loramux-adapter`` and ``x-loramux-model``: what answers, see Served.label and
        Served.version."""
        return {
            "x-loramux-adapter": self._served.label,
            "x-loramux-model": self._served.version,
        }

    def cancel(self) -> None:
        """Nobody wants the rest. Harmless at the end."""
        for generation in self.generations:
            generation.cancel()

    def done(self, index: int) -> Done:
        """How choice ``index`` ended well."""
        done = self.generations[index].done
        assert done is not None, "asked before the end"
        return done

    def stop_reason(self, index: int) -> str | int | None:
        """What vLLM says: the stop string or stop token that matched, null for an EOS."""
        reason = self.done(index).stop_reason
        asked = self._body.stop_token_ids or ()
        return None if reason in self._eos_ids and reason not in asked else reason

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that choice ``index`` continues."""
        return self.prompts[index // self.n]

    def usage(self, completion_tokens: int | None = None) -> Usage:
        """Counts of the finished request. What one choice found in the cache because its twin had
        just put it there is not counted, so the number does not depend on n."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        ends = [self.done(index) for index in range(len(self.generations))]
        if completion_tokens is None:
            completion_tokens = sum(done.num_output_tokens for done in ends)
        cached = sum(done.cached_tokens for done in ends[:: self.n])
        details = usage_details(self._speculation, self._entropy, ends)
        return Usage(
            prompt_tokens,
            completion_tokens,
            prompt_tokens + completion_tokens,
            PromptDetails(cached),
            predictions(details),
            details,
        )

    def usage_so_far(self, index: int, delta: Delta | None) -> UsageSoFar:
        """Counts of choice ``index`` up to ``delta`` (None: its end); ask once for each of them."""
        made = self._made.get(index, 0) + (len(delta.token_ids) if delta else 0)
        self._made[index] = made
        prompt = len(self.prompt_of(index).ids)
        return UsageSoFar(prompt, made, prompt + made)

    async def collect(self) -> list[Delta]:
        """Every choice's whole output; the first failure ends all."""
        whole = [Delta() for _ in self.generations]
        async for index, delta in self.merged():
            if delta is not None:
                whole[index].extend(delta)
        return whole

    async def merged(self) -> AsyncGenerator[tuple[int, Delta | None]]:
        """(choice, what is new) as it comes; None once for each choice that has ended.

        Reads no further ahead than one Delta a choice: what a slow reader leaves waits in the
        generations, merged.
        """
        if len(self.generations) == 1:
            async for delta in self.generations[0]:
                yield 0, delta
            yield 0, None
            return
        news: asyncio.Queue[tuple[int, Delta | None | Exception]] = asyncio.Queue(maxsize=1)
        pumps = [
            asyncio.create_task(_pump(index, generation, news))
            for index, generation in enumerate(self.generations)
        ]
        try:
            running = len(pumps)
            while running:
                index, item = await news.get()
                if isinstance(item, Exception):
                    raise item
                running -= item is None
                yield index, item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int,
    generation: Generation,
    news: asyncio.Queue[tuple[int, Delta | None | Exception]],
) -> None:
    try:
        async for delta in generation:
            await news.put((index, delta))
        await news.put((index, None))
    except Exception as exc:
        await news.put((index, exc))
