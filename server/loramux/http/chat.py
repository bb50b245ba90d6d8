"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from fastapi import Request
from msgspec import UNSET
from starlette.responses import Response

from loramux.errors import InvalidRequest
from loramux.front.front import Front
from loramux.front.generation import Delta
from loramux.front.voices import Voice
from loramux.http.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Message,
    MessageDelta,
)
from loramux.http.auth import caller
from loramux.http.choices import Choices, Prompt, admit, engine_of, resolve, room_for, speaking
from loramux.http.events import deliver, event
from loramux.http.limits import read_json
from loramux.http.logprobs import chat_logprobs
from loramux.http.schemas import ChatRequest
from loramux.metrics.prometheus import Exporter


class Chat:
    """The route's handler."""

    def __init__(self, front: Front, exporter: Exporter) -> None:
        self._front, self._exporter = front, exporter

    async def create(self, request: Request) -> Response:
        """Answer a conversation; see ChatRequest for the fields."""
        arrived_at = time.monotonic()
        front = self._front
        body = ChatRequest.parse(
            await read_json(request),
            strict=front.config.strict_fields,
            ignored=self._exporter.ignored,
        )
        tenant = caller(request).tenant
        served = resolve(front, body, tenant)
        self._exporter.asked(body.num_choices)
        text = "".join(message.content for message in body.messages)
        with admit(front, body, served, tenant, [text], body.output_limit):
            voice = await front.voices.of(served)
            body = speaking(body, voice)
            prompt = await self._prompt(body, voice)
            limit, most = body.output_limit, voice.max_tokens
            room = room_for(front, prompt, limit, tenant=tenant, param="messages", most=most)
            choices = Choices(front, body, served, voice, [prompt], "chatcmpl", tenant=tenant)
            choices.submit(
                [room],
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                prompt_logprobs=None,
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

    async def _prompt(self, body: ChatRequest, voice: Voice) -> Prompt:
        ids = await self._front.voices.prompt(
            voice,
            [message.plain() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
            most=engine_of(self._front).max_model_len,
        )
        if not ids:
            raise InvalidRequest("messages: the chat template made no prompt", param="messages")
        return Prompt(ids)


class _Answer:
    """Turns what the choices produce into OpenAI's objects."""

    def __init__(self, body: ChatRequest, model: str, choices: Choices, front: Front) -> None:
        self._body, self._model, self._choices = body, model, choices
        self._tokenizer = front.tokenizer

    def whole(self, outputs: list[Delta]) -> ChatCompletion:
        """The answer in one piece."""
        answer = ChatCompletion(
            self._choices.id,
            self._choices.created,
            self._model,
            [self._choice(index, output) for index, output in enumerate(outputs)],
            self._choices.usage(),
        )
        if self._body.return_token_ids:
            answer.prompt_token_ids = self._choices.prompts[0].ids
        return answer

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as it comes: each choice's role, as soon as there is text; its text, its
        finish_reason."""
        begun = False
        async with aclosing(self._choices.merged()) as merged:
            async for index, delta in merged:
                if not begun:
                    begun = True
                    for role in self._roles():
                        yield role
                chunk = self._chunk([self._piece(index, delta)])
                if self._body.continuous_usage:
                    chunk.usage = self._choices.usage_so_far(index, delta)
                yield event(chunk)
        if self._body.include_usage:
            last = self._chunk([])
            last.usage = self._choices.usage()
            yield event(last)

    def _roles(self) -> Iterator[bytes]:
        for index in range(len(self._choices.generations)):
            chunk = self._chunk([ChatChunkChoice(index, MessageDelta("assistant", ""))])
            if index == 0 and self._body.return_token_ids:
                chunk.prompt_token_ids = self._choices.prompts[0].ids
            if self._body.continuous_usage:
                chunk.usage = self._choices.usage_so_far(index, Delta())
            yield event(chunk)

    def _choice(self, index: int, output: Delta) -> ChatChoice:
        return ChatChoice(
            index,
            Message(output.text),
            self._logprobs(output),
            self._choices.done(index).finish_reason,
            self._choices.stop_reason(index),
            output.token_ids if self._body.return_token_ids else UNSET,
        )

    def _piece(self, index: int, delta: Delta | None) -> ChatChunkChoice:
        if delta is None:
            return ChatChunkChoice(
                index,
                MessageDelta(),
                finish_reason=self._choices.done(index).finish_reason,
                stop_reason=self._choices.stop_reason(index),
            )
        return ChatChunkChoice(
            index,
            MessageDelta(content=delta.text),
            logprobs=self._logprobs(delta),
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, delta.logprobs or [])

    def _chunk(self, pieces: list[ChatChunkChoice]) -> ChatChunk:
        usage = None if self._body.include_usage else UNSET
        return ChatChunk(self._choices.id, self._choices.created, self._model, pieces, usage=usage)
