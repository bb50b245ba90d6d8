"""A forward pass on a GPU: one copy of the step's arrays, then a recorded graph or plain launches.

A decode step is hundreds of small launches that cost the host more than the device. So the whole
pass is recorded once for each number of rows in BUCKETS and replayed with one call: the launches
depend on the model alone, and which requests, pages, adapters and ranks there are stands in arrays
that every replay reads anew. Rows up to the bucket are padding: no list names them, so they touch
neither the pool nor a real row. Larger steps, and steps that compute prompts, go through the same
kernels and arrays launch by launch.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from loramux.model.decoder import Decoder
from loramux.model.inputs import ModelInputs, StepArrays
from loramux_kernels.attention import Pages
from loramux_kernels.attention.pages import parts_elements
from loramux_kernels.lora import Runs
from loramux_kernels.lora.work import MOST_MODULES, RECORDED, LoraWork, lora_work
from loramux_kernels.mirror import StandingMirror, scratch, scratch_addresses
from loramux_kernels.tuning import table_of

log = logging.getLogger("loramux.model.graphs")

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows a graph is recorded for."""
USUAL_RANK = 64
USUAL_PARTS = 4
USUAL_TILES = 8
USUAL_PAGES = 64
USUAL_ADAPTERS = 256
"""What is made room for at the start, mostly for a row; more moves arrays, and the graphs that know
the old place are recorded again when they are next wanted."""

RECORDED_TILES = replace(RECORDED, any_tiles=True)

Launch = Callable[[], torch.Tensor]
Recorder = Callable[[Launch], Launch]
"""Takes the launches of a pass down; what it returns does them again."""


def cuda_recorder() -> Recorder:
    """Records CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        # Adapters are copied by a thread of their own meanwhile, which is no concern of the graph.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = launch()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    return record


class DeviceForward:
    """Runs ``decoder`` on its device. Without a ``recorder`` every step is launched as it comes."""

    def __init__(self, decoder: Decoder, page_tokens: int, recorder: Recorder | None) -> None:
        self._decoder = decoder
        self._page_tokens = page_tokens
        self._recorder = recorder
        self._device = decoder.weights.norm.device
        self._tuned = table_of(self._device)
        most = decoder.max_tokens
        self._buckets = [rows for rows in BUCKETS if rows <= most]
        self._mirror = StandingMirror(self._device, _room(most, decoder.architecture.num_layers))
        self._graphs: dict[tuple[int, bool], Launch] = {}
        self._addresses: tuple[int, ...] = ()
        self.num_replays = 0

    def prepare(self) -> None:
        """Compile what steps need and record every graph, so that no request waits for it. Nothing
        is computed: the lists that say what to do are empty."""
        decoder, largest = self._decoder, self._buckets[-1]
        decoder.table.reserve(USUAL_ADAPTERS, decoder.arena.numel() // decoder.table.slice_bytes)
        decoder.reserve_logits(largest)
        self._reserve(largest * MOST_MODULES * USUAL_RANK, largest * USUAL_PARTS)
        self._write(self._nothing(), largest)
        decoder.forward(self._recorded([2], RECORDED_TILES))
        for rows in self._buckets if self._recorder is not None else [1]:
            for work in (None, RECORDED):
                inputs = self._recorded([1] * rows, work)
                decoder.forward(inputs)
                self._graph(rows, work is not None)

    def forward(self, step: StepArrays) -> torch.Tensor:
        """Float32 logits ``[S, vocab]``, good until the next call."""
        tokens, scored = len(step.token_ids), len(step.scored)
        rows = self.bucket(step)
        work, num_parts = self._write(step, rows)
        if rows is not None and (replay := self._graph(rows, work.any_rows)) is not None:
            self.num_replays += 1
            for layer in (0, self._decoder.architecture.num_layers - 1):
                step.before_layer(layer)  # a graph does not stop between: all must have arrived
            return replay()[:scored]
        step.pages.bind(self._mirror.tensors, num_parts)
        step.runs.bind(work, self._mirror.tensors)
        inputs = self._inputs(tokens, scored, step.pages, step.runs)
        inputs = replace(inputs, scored_rows=step.scored, before_layer=step.before_layer)
        return self._decoder.forward(inputs)

    def bucket(self, step: StepArrays) -> int | None:
        """The rows of the graph that can run ``step``: a decode of all its rows, none too many, by
        adapters that are pairs alone."""
        rows = len(step.token_ids)
        if self._recorder is None or rows > self._buckets[-1]:
            return None
        if not step.alone.all() or len(step.scored) != rows:
            return None
        if not step.runs.is_plain(self._decoder.table):
            return None
        return self._buckets[bisect_left(self._buckets, rows)]

    def _write(self, step: StepArrays, rows: int | None) -> tuple[LoraWork, int]:
        """Bring the step to the device, for a graph with its ids padded to ``rows``."""
        work = lora_work(
            step.runs,
            self._decoder.table,
            lone_rows=self._tuned.lone_rows,
            lone_ranks=self._tuned.lone_ranks,
            alone=step.alone,
        )
        arrays, num_parts = step.pages.arrays()
        token_ids, positions, scored = step.token_ids, step.positions, step.scored
        if rows is not None:
            self._reserve(work.h_elements, num_parts)
            padding = (0, rows - len(token_ids))
            token_ids, positions = np.pad(token_ids, padding), np.pad(positions, padding)
            scored = np.arange(rows)
        ids = {"token_ids": token_ids, "positions": positions, "scored": scored}
        self._mirror.write({**ids, **work.arrays, **arrays})
        return work, num_parts

    def _graph(self, rows: int, adapters: bool) -> Launch | None:
        """The recorded pass, recorded now if it is missing or something it reads has moved."""
        addresses = self._where()
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        key = (rows, adapters)
        if key not in self._graphs and self._recorder is not None:
            inputs = self._recorded([1] * rows, RECORDED if adapters else None)
            try:
                self._graphs[key] = self._recorder(lambda: self._decoder.forward(inputs))
            except RuntimeError as error:
                log.warning("no CUDA graphs, steps are launched one by one: %s", error)
                self._recorder = None
        return self._graphs.get(key)

    def _recorded(self, rows: list[int], work: LoraWork | None) -> ModelInputs:
        """Inputs of requests with ``rows`` rows each, of which only the number of rows and the
        addresses of the arrays matter."""
        row_start = np.cumsum([0, *rows], dtype=np.int32)
        pages = self._pages(row_start, np.array(rows, np.int32))
        pages.bind(self._mirror.tensors, 1)
        runs = Runs.build([int(row_start[-1])], [[]])
        if work is not None:
            runs.bind(work, self._mirror.tensors)
        return self._inputs(runs.num_rows, runs.num_rows, pages, runs)

    def _nothing(self) -> StepArrays:
        none = np.zeros(0, np.int64)
        pages = self._pages(np.zeros(1, np.int32), np.zeros(0, np.int32))
        return StepArrays(none, none, pages, Runs.build([], []), none, np.zeros(0, np.bool_))

    def _pages(self, row_start: npt.NDArray[np.int32], context: npt.NDArray[np.int32]) -> Pages:
        arch = self._decoder.architecture
        return Pages(
            offsets=np.zeros((1, len(context), 1), np.int64),
            row_start=row_start,
            context=context,
            page_tokens=self._page_tokens,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            dtype=self._decoder.weights.norm.dtype,
            layer_start=np.zeros(arch.num_layers, np.int64),
        )

    def _inputs(self, rows: int, scored: int, pages: Pages, runs: Runs) -> ModelInputs:
        tensors = self._mirror.tensors
        return ModelInputs(
            token_ids=tensors["token_ids"][:rows],
            positions=tensors["positions"][:rows],
            pages=pages,
            runs=runs,
            scored=tensors["scored"][:scored],
            scored_rows=np.arange(scored),
        )

    def _reserve(self, h_elements: int, num_parts: int) -> None:
        """What kernels would ask for only as they run, which a graph cannot."""
        arch = self._decoder.architecture
        scratch("lora_h", self._device, h_elements)
        elements = parts_elements(num_parts, 1, arch.num_heads, arch.head_dim)
        scratch("attention_parts", self._device, elements)

    def _where(self) -> tuple[int, ...]:
        tables = self._decoder.table.tensors.values()
        return (
            self._mirror.address,
            self._decoder.logits_address,
            *(tensor.data_ptr() for tensor in tables),
            *scratch_addresses(self._device),
        )


def _room(tokens: int, layers: int) -> dict[str, tuple[type[np.generic], int]]:
    """What a step of ``tokens`` rows usually takes; ``pages`` varies most."""
    return {
        "token_ids": (np.int64, tokens),
        "positions": (np.int64, tokens),
        "scored": (np.int64, tokens),
        "lora_counts": (np.int32, 4),
        "lora_slot": (np.int32, tokens),
        "lora_scale": (np.float32, tokens),
        "lora_first_row": (np.int32, tokens),
        "lora_pitch": (np.int32, tokens),
        "lora_h_start": (np.int64, tokens),
        "lora_entry_start": (np.int32, tokens + 1),
        "expand_rows": (np.int32, 4 * tokens),
        "expand_tiles": (np.int32, 4 * tokens),
        "shrink_tiles": (np.int32, 4 * tokens),
        "shrink_rows": (np.int32, 4 * tokens * USUAL_TILES),
        "attention_counts": (np.int32, 4),
        "layer_start": (np.int64, layers),
        "page_start": (np.int64, tokens),
        "row_start": (np.int32, tokens + 1),
        "context": (np.int32, tokens),
        "request_of_row": (np.int32, tokens),
        "path_start": (np.int32, tokens + 1),
        "path_nodes": (np.int32, tokens),
        "fold_rows": (np.int32, 4 * tokens),
        "attention_items": (np.int32, 4 * tokens * USUAL_PARTS),
        "pages": (np.int64, tokens * USUAL_PAGES),
    }
