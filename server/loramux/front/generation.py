"""One choice of one request, seen from HTTP: what was asked, the text as it comes, how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from loramux.errors import LoramuxError
from loramux.front.drafts import Drafted
from loramux.request import Adapters, EntropyAdaptive, FinishReason, SamplingParams, Speculation
from loramux.wire import TokenLogprob


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """Everything the front must know of one choice; resolved, nothing left to default.

    ``request_id`` is unique among unfinished choices (a request with n choices or several prompts
    numbers them). ``companions``: what other models wear for it, by model id. ``stop`` are
    non-empty strings that end the text. ``arrived_at`` is ``time.monotonic()`` when the request
    reached the server: TTFT counts from there. ``deadline_s`` counts from ``arrived_at`` too.
    ``pool_share``: the tenant's, which the front fills in.
    """

    request_id: str
    adapters: Adapters
    prompt_ids: list[int]
    sampling: SamplingParams
    speculation: Speculation | None = None
    entropy: EntropyAdaptive | None = None
    companions: Mapping[int, Adapters] = field(default_factory=dict)
    tenant: str = ""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = ""
    deadline_s: float | None = None
    pool_share: float | None = None
    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def digests(self) -> Iterator[str]:
        """Every adapter version that it needs the files of."""
        for adapters in (self.adapters, *self.companions.values()):
            for adapter in adapters:
                yield adapter.digest


@dataclass(slots=True)
class Delta:
    """What is new since the last Delta; several steps are merged when the reader is slow.

    ``text`` may lag behind ``token_ids``: half a character, or what may become a stop string, is
    held back. ``logprobs`` has one entry per token id when they were asked for, else None.
    ``prompt_logprobs`` comes once, in the first Delta, when asked for: one entry per prompt token,
    None for the first. The last Delta may have text and no token ids.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def extend(self, later: Delta) -> None:
        """Append what came after this."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs


@dataclass(frozen=True, kw_only=True)
class Done:
    """The good terminal event.

    ``stop_reason``: the stop string that matched, or the id of the token that ended it (EOS
    included), or None. ``queue_s`` and ``prefill_s`` are the engine's (0 for a
    choice cancelled before its first token). ``*_at`` are ``time.monotonic()`` readings;
    ``first_token_at`` is None when no token came. ``drafts``: what became of guesses, by drafter.
    ``by_model``: wire.Output's ``ledger`` of the tokens that were delivered.
    """

    finish_reason: FinishReason
    stop_reason: str | int | None
    num_output_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    first_token_at: float | None
    finished_at: float
    drafts: Mapping[str, Drafted] = field(default_factory=dict)
    by_model: tuple[int, int, int, int] | None = None


class Generation(AsyncIterator[Delta]):
    """``async for delta in generation``; afterwards ``done`` is set.

    Iteration ends normally exactly when ``done`` is set and every Delta was read; it raises the
    LoramuxError of the failure otherwise (after the Deltas that came before it). One reader only.
    What a slow reader has not taken yet is merged into one Delta, so no more waits here than the
    request's own output.
    """

    def __init__(self, spec: GenerationSpec, on_cancel: Callable[[str], None]) -> None:
        self.spec = spec
        self.done: Done | None = None
        self.error: LoramuxError | None = None
        self._on_cancel = on_cancel
        self._unread: Delta | None = None
        self._waiting: asyncio.Future[None] | None = None

    async def __anext__(self) -> Delta:
        while self._unread is None:
            if self.error is not None:
                raise self.error
            if self.done is not None:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        delta, self._unread = self._unread, None
        return delta

    def cancel(self) -> None:
        """The client left: abort in the engine if unfinished (``done`` says "abort"). Idempotent.

        Must be called when a client disconnects; harmless after the end, so a ``finally`` may.
        """
        if self.done is None and self.error is None:
            self._on_cancel(self.spec.request_id)

    def deliver(self, delta: Delta) -> None:
        """The front has news for the reader."""
        if self._unread is None:
            self._unread = delta
        else:
            self._unread.extend(delta)
        self._wake()

    def end(self, outcome: Done | LoramuxError) -> None:
        """The terminal event; there is exactly one."""
        assert self.done is None and self.error is None, "a second terminal event"
        if isinstance(outcome, Done):
            self.done = outcome
        else:
            self.error = outcome
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
