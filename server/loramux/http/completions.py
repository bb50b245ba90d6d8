"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from msgspec import UNSET
from starlette.responses import Response

from loramux.errors import InvalidRequest
from loramux.front.front import Front
from loramux.front.generation import Delta
from loramux.front.voices import Voice
from loramux.http.answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    UsageSoFar,
)
from loramux.http.auth import caller
from loramux.http.choices import Choices, Prompt, admit, engine_of, resolve, room_for, speaking
from loramux.http.events import deliver, event
from loramux.http.limits import read_json
from loramux.http.logprobs import OffsetLogprobs
from loramux.http.schemas import CompletionRequest
from loramux.metrics.prometheus import Exporter


class Completions:
    """The route's handler."""

    def __init__(self, front: Front, exporter: Exporter) -> None:
        self._front, self._exporter = front, exporter

    async def create(self, request: Request) -> Response:
        """Continue each prompt; see CompletionRequest for the fields."""
        arrived_at = time.monotonic()
        front = self._front
        body = CompletionRequest.parse(
            await read_json(request),
            strict=front.config.strict_fields,
            ignored=self._exporter.ignored,
        )
        tenant = caller(request).tenant
        served = resolve(front, body, tenant)
        self._exporter.asked(body.num_choices)
        with admit(front, body, served, tenant, body.prompt, body.output_limit):
            voice = await front.voices.of(served)
            body = speaking(body, voice)
            prompts = await self._prompts(body)
            rooms = [self._room(body, voice, prompt, tenant) for prompt in prompts]
            choices = Choices(front, body, served, voice, prompts, "cmpl", tenant=tenant)
            choices.submit(
                rooms,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                arrived_at=arrived_at,
            )
        return await deliver(
            request,
            choices,
            _Answer(body, served.name, choices, front),
            stream=bool(body.stream),
            keep_alive_s=front.config.keep_alive_s,
            on_gone=self._exporter.disconnected,
        )

    def _room(self, body: CompletionRequest, voice: Voice, prompt: Prompt, tenant: str) -> int:
        most = voice.max_tokens if body.max_tokens is None else None
        # A prompt that is only echoed goes through the engine all the same: its log-probabilities
        # come from there. It makes one token, which is dropped.
        wanted = max(1, body.output_limit) if most is None else None
        return room_for(self._front, prompt, wanted, tenant=tenant, param="prompt", most=most)

    async def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        return await asyncio.gather(*(self._prompt(body, item) for item in body.prompt))

    async def _prompt(self, body: CompletionRequest, item: str | list[int]) -> Prompt:
        tokenizer = self._front.tokenizer
        if isinstance(item, str):
            most = engine_of(self._front).max_model_len
            add = body.add_special_tokens is not False
            ids = await tokenizer.encode(item, add, most=most, param="prompt")
            if not ids:
                raise InvalidRequest("prompt: no tokens", param="prompt")
            return Prompt(ids, item)
        skip = body.skip_special_tokens is not False
        return Prompt(item, await tokenizer.decode(item, skip) if body.echo else "")


class _Answer:
    """Turns what the choices produce into OpenAI's objects."""

    def __init__(self, body: CompletionRequest, model: str, choices: Choices, front: Front) -> None:
        self._body, self._model, self._choices = body, model, choices
        self._only_echo = body.output_limit == 0
        skip = body.skip_special_tokens is not False
        self._logprobs = [OffsetLogprobs(front.tokenizer, skip) for _ in choices.generations]
        self._begun = [False] * len(choices.generations)

    def whole(self, outputs: list[Delta]) -> Completion:
        """The answer in one piece."""
        pieces = [self._piece(index, output) for index, output in enumerate(outputs)]
        for piece in pieces:
            self._end(piece)
        answer = self._completion(pieces)
        answer.usage = self._usage()
        return answer

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as it comes."""
        async with aclosing(self._choices.merged()) as merged:
            async for index, delta in merged:
                if delta is None:
                    piece = CompletionChoice(index, "")
                    self._end(piece)
                else:
                    piece = self._piece(index, delta)
                chunk = self._chunk([piece])
                if self._body.continuous_usage:
                    chunk.usage = self._usage_so_far(index, delta)
                yield event(chunk)
        if self._body.include_usage:
            last = self._chunk([])
            last.usage = self._usage()
            yield event(last)

    def _completion(self, pieces: list[CompletionChoice]) -> Completion:
        return Completion(self._choices.id, self._choices.created, self._model, pieces)

    def _chunk(self, pieces: list[CompletionChoice]) -> Completion:
        chunk = self._completion(pieces)
        chunk.usage = None if self._body.include_usage else UNSET
        return chunk

    def _usage(self) -> Usage:
        return self._choices.usage(0 if self._only_echo else None)

    def _usage_so_far(self, index: int, delta: Delta | None) -> UsageSoFar:
        if self._only_echo:
            num = len(self._choices.prompt_of(index).ids)
            return UsageSoFar(num, 0, num)
        return self._choices.usage_so_far(index, delta)

    def _piece(self, index: int, delta: Delta) -> CompletionChoice:
        """New text of choice ``index``; its first piece brings the prompt when that is echoed."""
        first, self._begun[index] = not self._begun[index], True
        prompt = self._choices.prompt_of(index)
        if self._only_echo:
            delta = Delta(prompt_logprobs=delta.prompt_logprobs)
        echoed = bool(first and self._body.echo)
        piece = CompletionChoice(index, prompt.text + delta.text if echoed else delta.text)
        if self._body.logprobs is not None:
            piece.logprobs = self._piece_logprobs(index, delta, prompt if echoed else None)
        if self._body.return_token_ids:
            piece.token_ids = delta.token_ids
            if first:
                piece.prompt_token_ids = prompt.ids
        return piece

    def _piece_logprobs(
        self, index: int, delta: Delta, echoed: Prompt | None
    ) -> CompletionLogprobs:
        writer = self._logprobs[index]
        if echoed is None:
            return writer.piece(delta.token_ids, delta.logprobs or [])
        before = writer.piece(echoed.ids, delta.prompt_logprobs or [])
        writer.restart_at(len(echoed.text))
        after = writer.piece(delta.token_ids, delta.logprobs or [])
        return CompletionLogprobs(
            before.text_offset + after.text_offset,
            before.token_logprobs + after.token_logprobs,
            before.tokens + after.tokens,
            before.top_logprobs + after.top_logprobs,
        )

    def _end(self, piece: CompletionChoice) -> None:
        if self._only_echo:
            piece.finish_reason = "length"
            return
        piece.finish_reason = self._choices.done(piece.index).finish_reason
        piece.stop_reason = self._choices.stop_reason(piece.index)
