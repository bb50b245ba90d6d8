"""One sampler for all running requests: logits in, tokens out, whatever the batch looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.errors import InvalidRequest
from loramux.request import SamplingParams
from loramux.sampling.history import History
from loramux.sampling.logprobs import logprobs
from loramux.sampling.processors import Bias, Edit, Mask, Penalties, edited
from loramux.sampling.typical import typical
from loramux.wire import TokenLogprob
from loramux_kernels import sampling as kernels

MOST_BATCHES = 16
NOTHING_GUESSED: Mapping[int, Sequence[int]] = {}


@dataclass(frozen=True)
class SampleResult:
    """What R rows drew.

    ``token_ids`` int64 [R]; ``bad`` [R]: the row's logits held a NaN, a +inf or nothing finite, its
    token is -1 and its request cannot go on. ``logprobs`` [R]: None where none were asked for, and
    for bad rows. ``typical``: of each guess that was to be judged. ``entropies`` [R]: bits of the
    distributions as the model made them, of watched requests' rows, else NaN; None when there are
    no such rows.
    """

    token_ids: NDArray[np.int64]
    bad: NDArray[np.bool_]
    logprobs: list[TokenLogprob | None]
    typical: list[bool]
    entropies: list[float] | None = None


@dataclass(frozen=True)
class _Request:
    params: SamplingParams
    key: int
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    stop_ids: NDArray[np.int64]
    history: History | None
    watched: bool


@dataclass(frozen=True)
class _Batch:
    """What a sequence of requests, one a row, needs at every step.

    ``num_logprobs`` [R] is -1 for none; ``watched`` are the rows whose entropy is asked for.
    ``held`` and ``penalized`` are those that may need their stop tokens masked and their penalties
    applied; both depend on how far the output is.
    """

    draw: kernels.DrawParams
    bias: list[Edit]
    held: list[tuple[int, _Request]]
    penalized: list[tuple[int, _Request, History]]
    num_logprobs: NDArray[np.int64]
    watched: list[int]


class Sampler:
    """Draws tokens for requests it knows by id; keeps only what can be rebuilt from their ids."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._requests: dict[str, _Request] = {}
        self._batches: dict[tuple[str, ...], _Batch] = {}

    def add(
        self,
        request_id: str,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        *,
        watched: bool = False,
    ) -> None:
        """Learn a request, new or continued after ``output_ids``. ``watched``: its results come
        with entropies.

        Raises InvalidRequest for a ``logit_bias`` or penalized prompt id outside the vocabulary.
        """
        assert request_id not in self._requests, f"{request_id} is already known"
        bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self._check_ids("logit_bias", bias_ids)
        stop_ids = np.unique(np.asarray(params.stop_token_ids, np.int64))
        self._requests[request_id] = _Request(
            params=params,
            key=kernels.stream_key(params.seed, params.choice),
            bias_ids=bias_ids,
            bias=np.fromiter(params.logit_bias.values(), np.float32, len(bias_ids)),
            # A stop id the model has no logit for is never drawn; there is nothing to mask.
            stop_ids=stop_ids[(stop_ids >= 0) & (stop_ids < self.vocab_size)],
            history=self._history(params, prompt_ids, output_ids),
            watched=watched,
        )

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        """``token_ids`` are now part of the request's output."""
        history = self._requests[request_id].history
        if history is not None:
            history.extend(token_ids)

    def remove(self, request_id: str) -> None:
        """Forget a request."""
        del self._requests[request_id]
        self._batches.clear()

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[tuple[str, int]],
        guessed: Mapping[int, Sequence[int]] = NOTHING_GUESSED,
    ) -> SampleResult:
        """:meth:`start`, and wait."""
        return self.start(logits, rows, guessed)()

    @torch.inference_mode()
    def start(
        self,
        logits: Tensor,
        rows: Sequence[tuple[str, int]],
        guessed: Mapping[int, Sequence[int]] = NOTHING_GUESSED,
        judged: Sequence[tuple[int, int]] = (),
    ) -> Callable[[], SampleResult]:
        """Begin to draw one token per row of ``logits`` float32 [R, V], contiguous. What it returns
        waits for a device and gives the result.

        ``rows`` [R] are (request id, output position); a request may have several, of which
        ``guessed`` has the ids that are taken to stand before a row behind the output so far.
        ``judged`` are (row, token) that shall be called typical there or not.
        ``logits`` come back as they were and must stay until the result is there. A row's result
        depends on its own logits, request and guesses alone.
        """
        assert logits.dtype == torch.float32 and logits.is_contiguous(), logits.dtype
        assert logits.shape == (len(rows), self.vocab_size), logits.shape
        batch = self._batch_of([request_id for request_id, _ in rows])
        position = np.fromiter((at for _, at in rows), np.int64, len(rows))
        with edited(logits, _edits(batch, position, guessed)):
            drawn = kernels.start_draw(logits, batch.draw, position)
            verdicts = typical(logits, batch.draw, judged) if judged else None
        return lambda: _result(logits, batch, verdicts, *drawn())

    def warm_up(self) -> None:
        """Compile everything a step can need, so that no request waits for it."""
        logits = torch.zeros((1, self.vocab_size), device=self.device)
        params = SamplingParams(seed=0, min_p=0.1, top_k=1, top_p=0.9, logprobs=1)
        self.add("warm-up", params, (), (), watched=True)
        self.sample(logits, [("warm-up", 0)])
        self.remove("warm-up")

    def _check_ids(self, param: str, ids: NDArray[np.int64]) -> None:
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise InvalidRequest(
                f"{param}: token id {outside[0]} is not in the vocabulary of"
                f" {self.vocab_size} tokens",
                param=param,
            )

    def _history(
        self, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> History | None:
        if params.repetition_penalty != 1.0:
            self._check_ids("prompt", np.asarray(prompt_ids, np.int64))
            return History(prompt_ids, output_ids)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            return History((), output_ids)
        return None

    def _batch_of(self, request_ids: list[str]) -> _Batch:
        """The batch's parameters; those of a recent batch if it held the same requests. A step has
        several: every model's, and every one of a draft's."""
        rows = tuple(request_ids)
        batch = self._batches.get(rows)
        if batch is None:
            if len(self._batches) >= MOST_BATCHES:
                del self._batches[next(iter(self._batches))]
            batch = _build([self._requests[name] for name in request_ids])
            self._batches[rows] = batch
        return batch


@torch.inference_mode()
def _result(
    logits: Tensor,
    batch: _Batch,
    verdicts: Tensor | None,
    token_ids: NDArray[np.int64],
    bad: NDArray[np.bool_],
) -> SampleResult:
    """What was drawn, with the log-probabilities and entropies that were asked for."""
    results: list[TokenLogprob | None] = [None] * len(token_ids)
    num_logprobs = batch.num_logprobs
    wanted = np.flatnonzero((num_logprobs >= 0) & ~bad)
    if len(wanted):
        chosen = logits if len(wanted) == len(token_ids) else logits[torch.from_numpy(wanted)]
        table = logprobs(chosen, token_ids[wanted].tolist(), num_logprobs[wanted].tolist())
        for row, entry in zip(wanted.tolist(), table, strict=True):
            results[row] = entry
    passed = [] if verdicts is None else verdicts.tolist()
    return SampleResult(token_ids, bad, results, passed, _entropies(logits, batch.watched))


def _entropies(logits: Tensor, watched: list[int]) -> list[float] | None:
    if not watched:
        return None
    entropies = [math.nan] * len(logits)
    for row, bits in zip(watched, kernels.entropy_bits(logits[watched]).tolist(), strict=True):
        entropies[row] = bits
    return entropies


def draw_params(params: Sequence[SamplingParams], keys: Sequence[int]) -> kernels.DrawParams:
    """What rows draw with whose requests have such ``params`` and stream ``keys``."""
    return kernels.DrawParams(
        temperature=np.array([p.temperature for p in params], np.float64),
        log_min_p=np.array(
            [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], np.float64
        ),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float64),
        key=np.array(keys, np.uint64),
    )


def _build(requests: list[_Request]) -> _Batch:
    params = [request.params for request in requests]
    biased = [(row, request) for row, request in enumerate(requests) if len(request.bias_ids)]
    bias: list[Edit] = []
    if biased:
        rows = np.array([row for row, _ in biased])
        bias.append(
            Bias(
                row=np.repeat(rows, [len(request.bias_ids) for _, request in biased]),
                token=np.concatenate([request.bias_ids for _, request in biased]),
                value=np.concatenate([request.bias for _, request in biased]),
            )
        )
    return _Batch(
        draw=draw_params(params, [request.key for request in requests]),
        bias=bias,
        held=[
            (row, request)
            for row, request in enumerate(requests)
            if request.params.min_tokens > 0 and len(request.stop_ids)
        ],
        penalized=[
            (row, request, request.history)
            for row, request in enumerate(requests)
            if request.history is not None
        ],
        num_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int64),
        watched=[row for row, request in enumerate(requests) if request.watched],
    )


def _edits(
    batch: _Batch, position: NDArray[np.int64], guessed: Mapping[int, Sequence[int]]
) -> list[Edit]:
    """The processors of this step, in the frozen order."""
    edits = list(batch.bias)
    held = [
        (row, request.stop_ids)
        for row, request in batch.held
        if position[row] < request.params.min_tokens
    ]
    if held:
        edits.append(
            Mask(
                row=np.repeat([row for row, _ in held], [len(ids) for _, ids in held]),
                token=np.concatenate([ids for _, ids in held]),
            )
        )
    if batch.penalized:
        edits.append(_penalties(batch.penalized, position, guessed))
    return edits


def _penalties(
    penalized: list[tuple[int, _Request, History]],
    position: NDArray[np.int64],
    guessed: Mapping[int, Sequence[int]],
) -> Penalties:
    seen = []
    for row, _, history in penalized:
        ahead = guessed.get(row, ())
        assert position[row] == history.num_outputs + len(ahead), "penalties need all before a row"
        seen.append(history.after(ahead) if ahead else (history.ids, history.counts))
    lengths = [len(ids) for ids, _ in seen]
    params = [request.params for _, request, _ in penalized]

    def each(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.asarray(values, np.float32), lengths)

    return Penalties(
        row=np.repeat(np.asarray([row for row, _, _ in penalized], np.int64), lengths),
        token=np.concatenate([ids for ids, _ in seen]),
        count=np.concatenate([counts for _, counts in seen]),
        repetition=each([p.repetition_penalty for p in params]),
        frequency=each([p.frequency_penalty for p in params]),
        presence=each([p.presence_penalty for p in params]),
    )
