"""What became of each request, as plain data for logs and traces: told once, when it is over.

An Exchange holds nothing that a client wrote but its x-request-id, which ``failures`` has checked:
routes are templates, names are those that the server found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.errors import LoramuxError
from loramux.http.choices import Choices
from loramux.http.failures import CLIENT_GONE

PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})


@dataclass(kw_only=True)
class Exchange:
    """One request and its answer. ``began_at`` is Unix seconds, ``began`` is ``time.monotonic()``.

    ``route`` is the template of the path, "" when no route has it; ``status`` is 0 when no answer
    began; ``error`` is the code of what went wrong, ``told`` what the client was told of it, and
    whether that was in a stream; ``traceparent`` is the header as it came.
    """

    request_id: str
    method: str
    began_at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0
    route: str = ""
    tenant: str = ""
    error: str | None = None
    told: tuple[LoramuxError, bool] | None = None
    choices: Choices | None = None
    traceparent: str = ""

    @property
    def is_probe(self) -> bool:
        """Asked many times a second by machines that watch."""
        return self.route in PROBES

    @property
    def model(self) -> str | None:
        """``name@generation`` of what answered, or would have."""
        return None if self.choices is None else self.choices.headers()["x-loramux-model"]

    @property
    def prompt_tokens(self) -> int | None:
        """Of all prompts; None when nothing was generated."""
        choices = self.choices
        return None if choices is None else sum(len(prompt.ids) for prompt in choices.prompts)

    @property
    def output_tokens(self) -> int | None:
        """Of all choices that ended well; None when nothing was generated."""
        if self.choices is None:
            return None
        ends = (generation.done for generation in self.choices.generations)
        return sum(done.num_output_tokens for done in ends if done is not None)

    @property
    def first_token_s(self) -> float | None:
        """From the request to the first token of any choice."""
        if self.choices is None:
            return None
        times = [
            generation.done.first_token_at - generation.spec.arrived_at
            for generation in self.choices.generations
            if generation.done is not None and generation.done.first_token_at is not None
        ]
        return min(times, default=None)

    def end(self, state: dict[str, Any]) -> None:
        """Takes what the layers below have left in the request's state."""
        self.seconds = time.monotonic() - self.began
        self.route = str(state.get("route", ""))
        self.tenant = getattr(state.get("caller"), "tenant", "")
        self.told = state.get("told")
        if self.told is not None:
            self.error = self.told[0].code
        elif state.get("gone"):
            self.error = CLIENT_GONE
        choices = state.get("choices")
        if isinstance(choices, Choices):
            self.choices = choices
            for generation in choices.generations:
                if generation.error is not None:
                    self.error = generation.error.code
                elif generation.done is None or generation.done.finish_reason == "abort":
                    self.error = self.error or CLIENT_GONE


Reader = Callable[[Exchange], None]


class Exchanges:
    """Pure ASGI: every reader is called with every request that is over. They must not raise."""

    def __init__(self, app: ASGIApp, readers: Sequence[Reader]) -> None:
        self.app, self.readers = app, readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["state"]
        exchange = Exchange(request_id=state["request_id"], method=scope["method"])
        for name, value in scope["headers"]:
            if name == b"traceparent":
                exchange.traceparent = value.decode("latin-1")

        async def send_noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            exchange.end(state)
            for reader in self.readers:
                reader(exchange)
