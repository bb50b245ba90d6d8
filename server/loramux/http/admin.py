"""What operators and tools ask: health, version, tokens, state, metrics."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from loramux import __version__
from loramux.errors import InvalidRequest
from loramux.front.admission import Claim
from loramux.front.front import Front
from loramux.http.adapters import answer
from loramux.http.auth import caller
from loramux.http.choices import engine_of, named
from loramux.http.limits import read_json
from loramux.http.schemas import DetokenizeRequest, Strict, TokenizeRequest
from loramux.http.state import State
from loramux.metrics.prometheus import Exporter

Body = TypeVar("Body", bound=Strict)


class Admin:
    """The handlers; they run on the main port, or on ``--admin-port`` alone."""

    def __init__(self, front: Front, exporter: Exporter) -> None:
        self._front, self._exporter = front, exporter
        self._state = State(front, prompts=front.config.admin_port is None)

    async def health(self) -> Response:
        """200 or 503, nothing else: what load balancers and vLLM's tools look at."""
        return Response(status_code=503 if self._front.not_ready() else 200)

    async def live(self) -> Response:
        """The event loop turns. Says nothing of the engine: restarting the front mends no GPU."""
        return answer({"status": "live"})

    async def ready(self) -> Response:
        """Whether to send requests here, and if not, why."""
        reasons = self._front.not_ready()
        body = {"status": "not_ready" if reasons else "ready", "reasons": reasons}
        return answer(body, 503 if reasons else 200)

    async def deep(self, canary: Annotated[int, Query(ge=0, le=1)] = 0) -> Response:
        """As ``ready``; with ``canary=1`` one token of a fixed prompt is made by the real engine as
        well, and must be the one that was made when that was first asked."""
        reasons = self._front.not_ready()
        if canary and not reasons and not await self._front.canary():
            reasons = ["canary_mismatch"]
        body = {"status": "not_ready" if reasons else "ready", "reasons": reasons}
        return answer(body, 503 if reasons else 200)

    async def version(self) -> Response:
        """The release."""
        return answer({"version": __version__})

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or a chat, as a request with it would have them."""
        front, tokenizer = self._front, self._front.tokenizer
        body = await self._read(TokenizeRequest, request)
        model = front.base_name if body.model is None else body.model
        tenant = caller(request).tenant
        served = named(front, "model", model, tenant)
        with front.admit(Claim(tenant=tenant)):
            if body.messages is not None:
                ids = await front.voices.prompt(
                    await front.voices.of(served),
                    [message.plain() for message in body.messages],
                    add_generation_prompt=body.add_generation_prompt is not False,
                    add_special_tokens=bool(body.add_special_tokens),
                )
            else:
                assert body.prompt is not None, "one of the two is there"
                ids = await tokenizer.encode(body.prompt, body.add_special_tokens is not False)
        texts = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        return answer(
            {
                "count": len(ids),
                "max_model_len": engine_of(front).max_model_len,
                "tokens": ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        front = self._front
        body = await self._read(DetokenizeRequest, request)
        if body.model is not None:
            named(front, "model", body.model, caller(request).tenant)
        if any(token_id >= front.tokenizer.vocab_size for token_id in body.tokens):
            raise InvalidRequest("tokens: no such token id", param="tokens")
        with front.admit(Claim(tenant=caller(request).tenant)):
            return answer({"prompt": await front.tokenizer.decode(body.tokens)})

    async def _read(self, kind: type[Body], request: Request) -> Body:
        strict = self._front.config.strict_fields
        return kind.parse(await read_json(request), strict=strict, ignored=self._exporter.ignored)

    async def state(self) -> Response:
        """Everything at once, for a person: see ``http.state``."""
        return Response(await self._state.read(), media_type="application/json")

    async def metrics(self) -> Response:
        """Prometheus text, a quarter of a second old at most."""
        return Response(await self._exporter.render(), media_type=CONTENT_TYPE_LATEST)
