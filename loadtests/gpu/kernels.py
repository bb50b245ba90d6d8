"""LoRA and attention at Llama-3.1-8B's shapes: time over the floor, beside plain torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from document import Cell, table
from timing import Action, Ceilings, replayed, seconds

from loramux_kernels.attention import Pages, paged_attention
from loramux_kernels.lora import MODULES, SITES, AdapterTable, Runs, add_lora
from loramux_kernels.lora.table import TABLE_MODULES

HIDDEN, KV, INTER, HEADS, KV_HEADS, DIM = 4096, 1024, 14336, 32, 8, 128
WIDTHS = dict.fromkeys(MODULES, (HIDDEN, HIDDEN)) | {
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "gate_proj": (HIDDEN, INTER),
    "up_proj": (HIDDEN, INTER),
    "down_proj": (INTER, HIDDEN),
}
SLICE_BYTES, CHUNK, LAYERS = 65536, 128, 2
CASES = [
    (rows, rank, adapters)
    for rank in (8, 16, 64, 128)
    for rows, adapters in ((1, 1), (8, 1), (8, 8), (32, 32), (64, 1), (64, 64), (512, 1), (512, 8))
]


class Adapters:
    """``count`` random bf16 adapters of one rank, laid out as in the pool, and as plain tensors."""

    def __init__(self, count: int, rank: int) -> None:
        self.rank = rank
        self.table = AdapterTable(
            num_layers=LAYERS, widths=WIDTHS, slice_bytes=SLICE_BYTES, chunk=CHUNK, device="cuda"
        )
        elements = LAYERS * rank * sum(a + b for a, b in WIDTHS.values())
        slices = -(-elements * 2 // SLICE_BYTES)
        numbers = torch.randn(count * slices * SLICE_BYTES // 2, device="cuda") * 0.02
        self.values = numbers.to(torch.bfloat16)
        self.arena = self.values.view(torch.uint8)
        self.starts = [i * slices * SLICE_BYTES // 2 for i in range(count)]
        self.offsets = np.zeros((2, LAYERS, len(TABLE_MODULES)), np.int64)
        end = 0
        for layer in range(LAYERS):
            for module, name in enumerate(MODULES):
                for side in (0, 1):
                    self.offsets[side, layer, module] = end
                    end += rank * WIDTHS[name][side]
        shape = (LAYERS, len(TABLE_MODULES))
        self.slots = [
            self.table.add(
                slices=np.arange(i * slices, (i + 1) * slices, dtype=np.int64) * SLICE_BYTES,
                a_offset=self.offsets[0],
                b_offset=self.offsets[1],
                rank=np.full(shape, rank, np.int32),
                scale=np.ones(shape, np.float32),
                dtype=torch.bfloat16,
            )
            for i in range(count)
        ]

    def matrix(self, adapter: int, layer: int, module: int, side: int) -> torch.Tensor:
        """A [rank, in] or B [rank, out]: a view, since the slices here follow each other."""
        width = WIDTHS[MODULES[module]][side]
        start = self.starts[adapter] + int(self.offsets[side, layer, module])
        return self.values[start : start + self.rank * width].view(self.rank, width)


def lora(ceiling: Ceilings, left_s: float) -> str:
    """A layer's four sites together, in microseconds a layer; what ``left_s`` seconds allow."""
    until = time.monotonic() + left_s
    rows = []
    for num_rows, rank, count in CASES:
        if time.monotonic() > until:
            break
        torch.cuda.empty_cache()
        rows.append(_lora_row(ceiling, num_rows, rank, count))
    columns = ["rows", "rank", "adapters", "loramux", "floor", "over floor"]
    columns += ["bmm", "loop", "cuBLAS, graph"]
    return (
        "Shrink and expand of all seven modules of a layer, microseconds; each row a request of "
        "its own up to 64 rows, prompts above. *bmm* has its weights stacked beforehand, *loop* is "
        "two products per adapter and module as launched by Python, *cuBLAS, graph* the same from "
        "a CUDA graph.\n\n" + table(columns, rows)
    )


def our_lora(
    ceiling: Ceilings, num_rows: int, rank: int, count: int
) -> tuple[float, float, Adapters, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Seconds of a layer, the same over its floor, and what it ran on."""
    adapters = Adapters(count, rank)
    each = num_rows // count
    if num_rows <= 64:
        lists = [[(adapters.slots[i // each], 1.0)] for i in range(num_rows)]
        runs = Runs.build([1] * num_rows, lists)
    else:
        runs = Runs.build([each] * count, [[(slot, 1.0)] for slot in adapters.slots])
    xs = {s: _random(num_rows, adapters.table.site_widths[s][0]) for s in SITES}
    ys = {s: _random(num_rows, adapters.table.site_widths[s][1]) for s in SITES}

    def layer_of(layer: int) -> Action:
        def act() -> None:
            for site in SITES:
                add_lora(
                    ys[site],
                    xs[site],
                    arena=adapters.arena,
                    table=adapters.table,
                    runs=runs,
                    layer=layer,
                    site=site,
                )

        return act

    weights = sum(a + b for a, b in WIDTHS.values()) * rank
    moved = 2 * (count * weights + num_rows * sum(a + 2 * b for a, b in WIDTHS.values()))
    took = replayed([layer_of(layer) for layer in range(LAYERS)])
    over = took / ceiling.floor(moved, 2 * num_rows * weights)
    return took, over, adapters, xs, ys


def _lora_row(ceiling: Ceilings, num_rows: int, rank: int, count: int) -> list[Cell]:
    took, over, adapters, xs, ys = our_lora(ceiling, num_rows, rank, count)
    each = num_rows // count
    loop = list(_loop(adapters, xs, ys, each))
    row: list[Cell] = [num_rows, rank, count, took * 1e6, took / over * 1e6, over]
    row.append(replayed(list(_stacked(adapters, xs, ys, each))) * 1e6)
    row.append(seconds(lambda: [action() for action in loop], repeats=5) / LAYERS * 1e6)
    row.append(replayed(loop) * 1e6)
    return row


def _loop(
    adapters: Adapters, xs: dict[str, torch.Tensor], ys: dict[str, torch.Tensor], each: int
) -> Iterator[Action]:
    for layer in range(LAYERS):
        pairs = []
        for site, modules in SITES.items():
            column = 0
            for module in modules:
                width = WIDTHS[MODULES[module]][1]
                for i in range(len(adapters.slots)):
                    rows = slice(i * each, (i + 1) * each)
                    a, b = (adapters.matrix(i, layer, module, side) for side in (0, 1))
                    pairs.append((xs[site][rows], a, b, ys[site][rows, column : column + width]))
                column += width

        def act(pairs: list[tuple[torch.Tensor, ...]] = pairs) -> None:
            for x, a, b, y in pairs:
                y.addmm_(x @ a.t(), b)

        yield act


def _stacked(
    adapters: Adapters, xs: dict[str, torch.Tensor], ys: dict[str, torch.Tensor], each: int
) -> Iterator[Action]:
    count = len(adapters.slots)
    for layer in range(LAYERS):
        batches = []
        for site, modules in SITES.items():
            column = 0
            for module in modules:
                width = WIDTHS[MODULES[module]][1]
                a, b = (
                    torch.stack([adapters.matrix(i, layer, module, side) for i in range(count)])
                    for side in (0, 1)
                )
                x = xs[site].view(count, each, -1)
                y = ys[site].view(count, each, -1)[:, :, column : column + width]
                batches.append((x, a.transpose(1, 2), b, y))
                column += width

        def act(batches: list[tuple[torch.Tensor, ...]] = batches) -> None:
            for x, a, b, y in batches:
                y += torch.bmm(torch.bmm(x, a), b)

        yield act


def attention(ceiling: Ceilings) -> str:
    """One layer's attention over paged KV."""
    cases = [
        (requests, 1, context)
        for context in (128, 1024, 8192)
        for requests in (1, 8, 32, 64, 256)
        if requests * context <= 1 << 19
    ]
    cases += [(1, 512, 512), (4, 128, 2048), (1, 512, 8192)]
    rows = [attention_row(ceiling, *case) for case in cases]
    columns = ["requests", "rows each", "context", "us", "floor", "over floor"]
    return table(columns, rows)


def attention_row(ceiling: Ceilings, requests: int, each: int, context: int) -> list[Cell]:
    pages_of = -(-context // 16)
    order = np.random.default_rng(0).permutation(requests * pages_of).astype(np.int64)
    pages = Pages(
        offsets=(order * SLICE_BYTES).reshape(1, requests, pages_of),
        row_start=np.array([0, *accumulate([each] * requests)], np.int32),
        context=np.full(requests, context, np.int32),
        page_tokens=16,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.bfloat16,
        layer_start=np.zeros(1, np.int64),
    )
    arena = _random(requests * pages_of, SLICE_BYTES // 2).view(torch.uint8).view(-1)
    qkv = _random(requests * each, (HEADS + 2 * KV_HEADS) * DIM)
    out = torch.empty(requests * each, HEADS * DIM, dtype=torch.bfloat16, device="cuda")

    def act() -> None:
        paged_attention(
            out, qkv, arena=arena, pages=pages, layer=0, num_heads=HEADS, scale=0.09, window=0
        )

    keys = requests * each * (context - (each - 1) / 2)
    moved = requests * context * 2 * KV_HEADS * DIM * 2 + qkv.nbytes + out.nbytes
    floor = ceiling.floor(moved, 4 * keys * HEADS * DIM)
    took = replayed([act] * 4)
    return [requests, each, context, took * 1e6, floor * 1e6, took / floor]


def _random(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
