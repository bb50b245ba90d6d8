"""Paged attention on the CPU at a 135M model's shapes: achieved bytes/s against the memory's.

PYTHONPATH=kernels:loadtests/kernels python loadtests/kernels/bench_attention.py --threads 2
"""

from __future__ import annotations

import argparse
from itertools import accumulate

import numpy as np
import torch
from bandwidth import measure

from loramux_kernels.attention import Pages, paged_attention
from loramux_kernels.jit import set_num_threads

HEADS, KV_HEADS, DIM, PAGE_TOKENS = 9, 3, 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    set_num_threads(args.threads)
    for requests, rows, context in ((32, 1, 1024), (1, 1, 8192), (1, 512, 512), (4, 128, 2048)):
        report(requests, rows, context)


def report(requests: int, rows: int, context: int) -> None:
    page_bytes = 2 * KV_HEADS * PAGE_TOKENS * DIM * 4
    shape = (1, requests, -(-context // PAGE_TOKENS))
    order = np.random.default_rng(0).permutation(shape[1] * shape[2]).astype(np.int64)
    pages = Pages(
        offsets=(order * page_bytes).reshape(shape),
        row_start=np.array([0, *accumulate([rows] * requests)], dtype=np.int32),
        context=np.full(requests, context, dtype=np.int32),
        page_tokens=PAGE_TOKENS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )
    arena = torch.randn(len(order) * page_bytes // 4).view(torch.uint8)
    qkv = torch.randn(requests * rows, (HEADS + 2 * KV_HEADS) * DIM)
    out = torch.empty(requests * rows, HEADS * DIM)

    def step() -> None:
        paged_attention(
            out, qkv, arena=arena, pages=pages, layer=0, num_heads=HEADS, scale=0.125, window=0
        )

    took, memory = measure(step)
    keys = requests * rows * (context - (rows - 1) / 2)
    print(
        f"{requests} x {rows} rows over {context} tokens: {took * 1e3:.2f} ms, "
        f"{arena.nbytes / took / 1e9:.2f} GB/s of KV (memory: {memory / 1e9:.1f}), "
        f"{4 * keys * HEADS * DIM / took / 1e9:.1f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
