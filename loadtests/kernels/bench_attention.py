"""Paged attention: time over the roofline, beside torch's attention over contiguous keys.

    python loadtests/kernels/bench_attention.py [--quick]

One layer of the 135M shape (9 heads, 3 KV heads of 64, pages of 16 tokens in random order). A case
is requests x rows of each over a context: 1 row is a decode, 512 a chunk of a prompt, in between
lie verifies and short prompts. Cases with little KV take turns on several sets of requests, so that
keys come from memory. The roofline is the larger of bytes (every request's keys and values once,
queries and outputs) over the read bandwidth and operations over the GEMM rate, both measured at
the start. Compared with, on keys and values that lie side by side already:

    sdpa    torch.nn.functional.scaled_dot_product_attention, all requests in one call
    matmul  matmul, softmax, matmul, a request at a time
"""

from __future__ import annotations

import argparse
import sys
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

import report
import roofline
import throughput
import torch

from loramux_kernels.attention import Pages, paged_attention
from loramux_kernels.jit import set_num_threads

HEADS, KV_HEADS, DIM, PAGE_TOKENS = 9, 3, 64, 16
CASES = (
    *((requests, 1, context) for requests in (1, 8, 32, 64) for context in (128, 1024)),
    *((requests, 1, 8192) for requests in (1, 8)),
    *((1, rows, context) for rows in (8, 32, 128, 512) for context in (512, 2048)),
    (4, 8, 1024),
    (4, 128, 2048),
)
COLD_BYTES = 128 << 20
"""KV that is touched before the same is touched again: more than caches hold."""


class Requests:
    """Sets of ``requests`` with ``rows`` rows each over ``context`` tokens, on their own pages."""

    def __init__(self, requests: int, rows: int, context: int, line: roofline.Roofline) -> None:
        self.shape = requests, rows, context
        self._line = line
        page_bytes = 2 * KV_HEADS * PAGE_TOKENS * DIM * line.dtype.itemsize
        pages = -(-context // PAGE_TOKENS)
        size = requests * pages * page_bytes
        self._sets = min(64, -(-COLD_BYTES // size))
        order = np.random.default_rng(0).permutation(self._sets * requests * pages)
        offsets = (order * page_bytes).reshape(self._sets, 1, requests, pages)
        self._pages = [
            Pages(
                offsets=np.ascontiguousarray(of_set, dtype=np.int64),
                row_start=np.array([0, *accumulate([rows] * requests)], dtype=np.int32),
                context=np.full(requests, context, dtype=np.int32),
                page_tokens=PAGE_TOKENS,
                num_kv_heads=KV_HEADS,
                head_dim=DIM,
                dtype=line.dtype,
            )
            for of_set in offsets
        ]
        self._qkv = self._random(requests * rows, (HEADS + 2 * KV_HEADS) * DIM)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._line.device).to(self._line.dtype)

    def ours_s(self) -> float:
        pages_of_all = self._sets * self._pages[0].offsets.size
        arena = self._random(pages_of_all, 2 * KV_HEADS * PAGE_TOKENS * DIM)
        arena = arena.view(-1).view(torch.uint8)
        out = torch.empty(len(self._qkv), HEADS * DIM, device=arena.device, dtype=self._qkv.dtype)
        turn = cycle(self._pages)

        def call() -> None:
            where = {"arena": arena, "pages": next(turn), "layer": 0}
            paged_attention(out, self._qkv, **where, num_heads=HEADS, scale=DIM**-0.5, window=0)

        for _ in self._pages:  # on a GPU every Pages goes to the device once, before it is captured
            call()
        return roofline.seconds(call, self._line.device)

    def others_s(self) -> dict[str, float]:
        requests, rows, context = self.shape
        kv = [self._random(2, requests, KV_HEADS, context, DIM) for _ in range(self._sets)]
        q = self._random(requests, HEADS, rows, DIM)
        mask = torch.ones(rows, context, dtype=torch.bool, device=q.device)
        mask = mask.tril(context - rows)
        turn = cycle(kv)

        def sdpa() -> None:
            k, v = next(turn)
            masked = mask if rows > 1 else None
            attend = torch.nn.functional.scaled_dot_product_attention
            attend(q, k, v, attn_mask=masked, enable_gqa=True)

        def matmul() -> None:
            k, v = next(turn)
            for i in range(requests):
                queries = q[i].view(KV_HEADS, -1, DIM)
                scores = torch.bmm(queries, k[i].transpose(1, 2)).mul_(DIM**-0.5)
                scores.view(KV_HEADS, -1, rows, context).masked_fill_(~mask, float("-inf"))
                torch.bmm(torch.softmax(scores, -1), v[i])

        return {
            name: roofline.seconds(action, self._line.device)
            for name, action in (("sdpa", sdpa), ("matmul", matmul))
        }

    def floor_s(self) -> float:
        requests, rows, context = self.shape
        keys = requests * rows * (context - (rows - 1) / 2)
        elements = requests * (2 * KV_HEADS * context + 2 * HEADS * rows) * DIM
        return self._line.seconds(elements * self._line.dtype.itemsize, 4 * keys * HEADS * DIM)


def case(requests: int, rows: int, context: int, line: roofline.Roofline) -> dict[str, Any]:
    work = Requests(requests, rows, context, line)
    ours, floor = work.ours_s(), work.floor_s()
    return {
        "requests": requests,
        "rows": rows,
        "context": context,
        "us": 1e6 * ours,
        "roofline_us": 1e6 * floor,
        "ratio": ours / floor,
        **{f"{name}_over": other / ours for name, other in work.others_s().items()},
    }


COLUMNS = {
    "requests": "requests",
    "rows": "rows of each",
    "context": "context",
    "us": "a layer, µs",
    "roofline_us": "roofline",
    "ratio": "time / roofline",
    "sdpa_over": "sdpa / ours",
    "matmul_over": "matmuls / ours",
}


def draw_plot(cases: list[dict[str, Any]], where: Any, name: str) -> None:
    title = f"Attention of one layer, {name}: time over roofline"
    with report.plot(where, f"attention-{name}", panels=2, title=title) as (left, right):
        for context in sorted({c["context"] for c in cases}):
            for axis, key, fixed in ((left, "requests", "rows"), (right, "rows", "requests")):
                mine = [c for c in cases if c["context"] == context and c[fixed] == 1]
                line = [c[key] for c in mine], [c["ratio"] for c in mine]
                axis.plot(*line, marker="o", label=f"{context} tokens")
        left.set(xlabel="requests of one row", ylabel="time / roofline")
        right.set(xlabel="rows of one request")
        for axis in (left, right):
            axis.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
            axis.set(xscale="log", yscale="log")
        left.legend(frameon=False)


def main() -> None:
    parser: argparse.ArgumentParser = report.arguments(__doc__)
    parser.add_argument("--device", default=roofline.default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    set_num_threads(args.threads)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    line = roofline.measure(args.device, dtype)
    found = throughput.header()
    found["machine"] |= line.describe()
    for requests, rows, context in CASES[:2] if args.quick else CASES:
        found["cases"].append(case(requests, rows, context, line))
        print(report.markdown(found["cases"][-1:], COLUMNS).splitlines()[-1], flush=True)
    where = report.folder(args)
    report.save(found, where, f"kernels-attention-{args.device}")
    print("\n" + report.markdown(found["cases"], COLUMNS))
    draw_plot(found["cases"], where, args.device)


if __name__ == "__main__":
    main()
