"""One token of a fixed prompt, through the real engine, again and again: it must be the same."""

from __future__ import annotations

import asyncio
import logging

from loramux.errors import LoramuxError, Overloaded
from loramux.request import BASE_MODEL_ID, SamplingParams
from loramux.wire import Failed, Output, Ready, StepDone, Submit

log = logging.getLogger(__name__)

TIE = 0.1
"""Two tokens whose log-probabilities are nearer than this are both right: on a GPU the sums depend
on what else is in the batch."""
PROMPT_TOKENS = 8
"""Fewer than a page, so that no canary finds another one's work in the prefix cache."""


class Canary:
    """Asks, and compares with the answer that the first canary of this base got."""

    def __init__(self) -> None:
        self._songs: dict[str, int] = {}
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
            sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=1, logprobs=2),
            cache_salt=request_id,
        )
        return submit, answer

    def hear(self, step: StepDone) -> bool | None:
        """A step is done: whether the canaries in it were right; None if there was none."""
        verdicts = []
        if self._waiting:
            verdicts += [self._end(output.request_id, output) for output in step.outputs]
            verdicts += [self._end(failure.request_id, failure) for failure in step.failed]
        known = [verdict for verdict in verdicts if verdict is not None]
        return all(known) if known else None

    def forget(self, error: LoramuxError) -> None:
        """The engine is gone."""
        for request_id in list(self._waiting):
            self._answer(request_id, error)

    def _end(self, request_id: str, outcome: Output | Failed) -> bool | None:
        if request_id not in self._waiting:
            return None
        if isinstance(outcome, Failed) and outcome.code == Overloaded.code:
            self._answer(request_id, Overloaded(outcome.message))
            return None
        if isinstance(outcome, Failed):
            log.error("the canary failed: %s", outcome.message)
            right = False
        else:
            right = self._is_right(self._waiting[request_id][0], outcome)
        self._answer(request_id, right)
        return right

    def _is_right(self, fingerprint: str, output: Output) -> bool:
        token = output.token_ids[0]
        first = self._songs.setdefault(fingerprint, token)
        right = token == first or _is_tie(output, first)
        if not right:
            log.error("the canary made token %d, the first one made %d", token, first)
        return right

    def _answer(self, request_id: str, answer: bool | LoramuxError) -> None:
        _, waiting = self._waiting.pop(request_id)
        if waiting.done():  # whoever asked has left
            return
        if isinstance(answer, LoramuxError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)


def _is_tie(output: Output, token: int) -> bool:
    """``token`` was as good as the one that came."""
    came = output.logprobs[0] if output.logprobs else None
    return came is not None and any(
        other == token and abs(came.logprob - logprob) < TIE for other, logprob in came.top
    )
