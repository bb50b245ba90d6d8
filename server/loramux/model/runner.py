"""One model on one device: a batch of rows in, the logits somebody asked for out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux.adapters.segments import build_runs
from loramux.batch import Batch, Row
from loramux.memory.formats import KvFormat
from loramux.model.decoder import Decoder
from loramux.model.graphs import DeviceForward, cuda_recorder
from loramux.model.inputs import StepArrays
from loramux_kernels.attention import Pages, Paths, compact


@dataclass(frozen=True)
class Scored:
    """The logits of one step: fp32 ``[S, vocab]``, and the hidden states ``[S, hidden]`` they were
    made of; both are good until the next step.

    ``sampling`` are the lines that are drawn from, row after row. ``prompt[j]`` is
    (index of a row, its first line): the row's every token was scored, for prompt log-probs.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    sampling: npt.NDArray[np.int64]
    prompt: list[tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """A batch, and all of its forward pass that does not depend on the ids: it can be made while
    the step that finds those is computed."""

    batch: Batch
    step: StepArrays
    sampling: npt.NDArray[np.int64]
    prompt: list[tuple[int, int]]


class Adapters(Protocol):
    """What a forward pass needs of residency."""

    def slot(self, digest: str) -> int: ...
    def before_layer(self, digests: Iterable[str]) -> Callable[[int], None]: ...


class ModelRunner:
    """Builds the inputs of ``decoder`` from batches whose KV lives where ``kv`` says and whose
    adapters lie where ``adapters`` does."""

    def __init__(self, decoder: Decoder, kv: KvFormat, adapters: Adapters) -> None:
        self._decoder = decoder
        self._kv = kv
        self._adapters = adapters
        self._dtype = decoder.weights.norm.dtype
        self._on_device: DeviceForward | None = None
        if decoder.weights.norm.is_cuda:
            self.use(DeviceForward(decoder, kv.page_tokens, cuda_recorder()))

    def use(self, on_device: DeviceForward) -> None:
        """Run steps through ``on_device``, made ready here."""
        on_device.prepare()
        self._on_device = on_device

    def plan(self, batch: Batch) -> Plan:
        """Get ready to compute ``batch``."""
        rows = batch.rows
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.kv.num_computed for row in rows), np.int64, len(rows))
        row_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=row_start[1:])
        scored, sampling, prompt = _scored(rows, row_start)
        paths = Paths.of([row.num_tokens for row in rows], [row.parents for row in rows])
        positions = np.arange(row_start[-1]) + np.repeat(starts - row_start[:-1], counts)
        if paths is not None:
            nodes = np.repeat(starts, counts) + paths.lengths - 1
            positions = np.where(paths.lengths > 0, nodes, positions)
        step = StepArrays(
            token_ids=np.empty(row_start[-1], np.int64),
            positions=positions,
            pages=self._pages(rows, row_start, starts + counts, paths),
            runs=build_runs(rows, self._adapters.slot),
            scored=scored,
            alone=np.repeat(counts == 1, counts),
        )
        return Plan(batch, step, sampling, prompt)

    def onward(self, plan: Plan) -> Plan:
        """The step after a ``plan`` of one token for each row, which was computed: the next token
        of every row, in pages that it has already."""
        pages = replace(plan.step.pages, context=plan.step.pages.context + 1)
        step = replace(plan.step, positions=plan.step.positions + 1, pages=pages)
        return replace(plan, step=step)

    def forward(self, plan: Plan) -> Scored:
        """Compute the batch, whose ids are all known: its KV is in the pool afterwards."""
        rows = plan.batch.rows
        np.concatenate([_ids(row) for row in rows], out=plan.step.token_ids)
        digests = (ref.digest for row in rows for ref in row.kv.adapters)
        step = replace(plan.step, before_layer=self._adapters.before_layer(digests))
        if self._on_device is None:
            logits = self._decoder.forward(step.on_cpu())
        else:
            logits = self._on_device.forward(step)
        hidden = self._decoder.scored_hidden(len(logits))
        return Scored(logits, hidden, plan.sampling, plan.prompt)

    def compact(self, plan: Plan, kept: Mapping[int, Sequence[int]]) -> None:
        """Of the trees of ``plan``, which was computed, keep the nodes ``kept[row]``: their KV lies
        as a chain's afterwards."""
        compact(self._decoder.arena, pages=plan.step.pages, kept=kept)

    def wipe(self, frames: Sequence[int]) -> None:
        """Zero what is in ``frames``, behind all that was computed so far."""
        if frames:
            self._decoder.arena.view(-1, self._kv.frame.frame_bytes)[list(frames)] = 0

    def _pages(
        self,
        rows: list[Row],
        row_start: npt.NDArray[np.int64],
        context: npt.NDArray[np.int64],
        paths: Paths | None,
    ) -> Pages:
        widest = max(row.kv.num_pages for row in rows)
        frames = np.zeros((len(rows), widest), np.int64)
        for index, row in enumerate(rows):
            frames[index, : row.kv.num_pages] = row.kv.page_table[: row.kv.num_pages]
        if self._on_device is None:
            offsets, layer_start = self._kv.offsets(frames), None
        else:
            # a device adds up each layer's part itself
            offsets = frames[None] * self._kv.frame.frame_bytes
            layer_start = self._kv.offsets(np.zeros(1, np.int64))[:, 0]
        return Pages(
            offsets=offsets,
            row_start=row_start.astype(np.int32),
            context=context.astype(np.int32),
            page_tokens=self._kv.page_tokens,
            num_kv_heads=self._kv.num_kv_heads,
            head_dim=self._kv.head_dim,
            dtype=self._dtype,
            layer_start=layer_start,
            paths=paths,
        )


def _ids(row: Row) -> npt.NDArray[np.int64]:
    first = row.kv.num_computed
    return row.request.ids[first : first + row.num_tokens]


def _scored(
    rows: list[Row], row_start: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[tuple[int, int]]]:
    """Which token rows to score: the last of each row that samples and those before it that guess,
    all of those whose prompt's log-probabilities are wanted."""
    if not any(row.request.wants_prompt_logprobs for row in rows):
        counts = np.fromiter((row.num_samples for row in rows), np.int64, len(rows))
        ends = np.cumsum(counts)
        scored = np.arange(counts.sum()) + np.repeat(row_start[1:] - ends, counts)
        return scored, np.arange(len(scored)), []
    pieces: list[npt.NDArray[np.int64]] = []
    sampling: list[int] = []
    prompt: list[tuple[int, int]] = []
    lines = 0
    for index, row in enumerate(rows):
        stop = int(row_start[index + 1])
        if row.request.wants_prompt_logprobs:
            prompt.append((index, lines))
            piece = np.arange(stop - row.num_tokens, stop)
        else:
            piece = np.arange(stop - row.num_samples, stop)
        pieces.append(piece)
        lines += len(piece)
        sampling += range(lines - row.num_samples, lines)
    return np.concatenate(pieces), np.asarray(sampling, np.int64), prompt
