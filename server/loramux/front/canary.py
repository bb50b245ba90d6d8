"""One token of a fixed prompt, through the real engine, again and again: it must be the same."""

from __future__ import annotations

import asyncio
import logging

from loramux.errors import LoramuxError, Overloaded
from loramux.request import BASE_MODEL_ID, SamplingParams
from loramux.wire import Failed, Ready, StepDone, Submit

log = logging.getLogger(__name__)

PROMPT_TOKENS = 8
"""Fewer than a page, so that no canary finds another one's work in the prefix cache."""


class Canary:
    """Asks, and compares with the answer that the first canary of this base got."""

    def __init__(self) -> None:
        self._songs: dict[str, list[int]] = {}
        self._waiting: dict[str, tuple[str, asyncio.Future[bool]]] = {}
        self._number = 0

    def ask(self, info: Ready) -> tuple[Submit, asyncio.Future[bool]]:
        """What to submit to the engine, and whether it will have been right."""
        self._number += 1
        request_id = f"canary-{self._number}"
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = (info.base.fingerprint, answer)
        submit = Submit(
            request_id=request_id,
            tenant="",
            model_id=BASE_MODEL_ID,
            adapters=(),
            prompt_ids=[number % info.vocab_size for number in range(1, PROMPT_TOKENS + 1)],
            sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=1),
            cache_salt=request_id,
        )
        return submit, answer

    def hear(self, step: StepDone) -> None:
        """A step is done, perhaps that of a canary."""
        if not self._waiting:
            return
        for output in step.outputs:
            self._end(output.request_id, output.token_ids)
        for failure in step.failed:
            self._end(failure.request_id, failure)

    def forget(self, error: LoramuxError) -> None:
        """The engine is gone."""
        for request_id in list(self._waiting):
            self._end(request_id, error)

    def _end(self, request_id: str, outcome: list[int] | Failed | LoramuxError) -> None:
        if request_id not in self._waiting:
            return
        fingerprint, answer = self._waiting.pop(request_id)
        if answer.done():  # whoever asked has left
            return
        if isinstance(outcome, Failed) and outcome.code == Overloaded.code:
            outcome = Overloaded(outcome.message)  # which says nothing of what it computes
        if isinstance(outcome, LoramuxError):
            answer.set_exception(outcome)
            return
        if isinstance(outcome, Failed):
            log.error("the canary failed: %s", outcome.message)
            answer.set_result(False)
            return
        first = self._songs.setdefault(fingerprint, outcome)
        if outcome != first:
            log.error("the canary made token %s, the first one made %s", outcome, first)
        answer.set_result(outcome == first)
