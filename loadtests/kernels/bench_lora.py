"""Segmented LoRA on the CPU at a 135M model's shapes: achieved bytes/s against the memory's.

PYTHONPATH=kernels:loadtests/kernels python loadtests/kernels/bench_lora.py --threads 2
"""

from __future__ import annotations

import argparse

import torch
from bandwidth import measure

from loramux_kernels.jit import set_num_threads
from loramux_kernels.lora import MODULES, SITES, Runs, add_lora
from loramux_kernels.testing import make_resident, random_weights

HIDDEN, KV, INTER = 576, 192, 1536
WIDTHS = dict.fromkeys(MODULES, (HIDDEN, HIDDEN)) | {
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "gate_proj": (HIDDEN, INTER),
    "up_proj": (HIDDEN, INTER),
    "down_proj": (INTER, HIDDEN),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="enough to leave the caches behind")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(0)
    weights = random_weights(
        WIDTHS,
        lambda *_: args.rank,
        num_layers=args.layers,
        dtype=DTYPES[args.dtype],
        generator=generator,
        integers=False,
    )
    arena, table, slots = make_resident(
        [weights] * args.adapters, WIDTHS, num_layers=args.layers, slice_bytes=24576, chunk=64
    )
    elements = args.rank * args.layers * sum(a + b for a, b in WIDTHS.values())
    size = elements * DTYPES[args.dtype].itemsize
    xs = {site: torch.randn(512, table.site_widths[site][0]) for site in SITES}
    ys = {site: torch.zeros(512, table.site_widths[site][1]) for site in SITES}

    def report(name: str, runs: Runs, adapters: int) -> None:
        rows = runs.num_rows

        def step() -> None:
            for layer in range(args.layers):
                for site in SITES:
                    y, x = ys[site][:rows], xs[site][:rows]
                    add_lora(y, x, arena=arena, table=table, runs=runs, layer=layer, site=site)

        took, memory = measure(step)
        calls = args.layers * len(SITES)
        print(
            f"{name}: {took * 1e3:.2f} ms for {args.layers} layers, {took / calls * 1e6:.0f} us a "
            f"call, {adapters * size / took / 1e9:.2f} GB/s of weights (memory: "
            f"{memory / 1e9:.1f}), {2 * elements * rows / took / 1e9:.1f} GFLOP/s"
        )

    every = [[(slot, 1.0)] for slot in slots]
    print(f"{args.adapters} adapters of rank {args.rank}, {args.dtype}, {size / 1e6:.1f} MB each")
    report("a row for each adapter", Runs.build([1] * args.adapters, every), args.adapters)
    report("1 row", Runs.build([1], every[:1]), 1)
    report("32 rows of one adapter", Runs.build([32], every[:1]), 1)
    report("512 rows of one adapter", Runs.build([512], every[:1]), 1)

    linears = [torch.randn(o, i) for i, o in table.site_widths.values()]

    def base() -> None:
        for x, w in zip(xs.values(), linears * args.layers, strict=False):
            torch.nn.functional.linear(x[: args.adapters], w)

    took, _ = measure(base)
    print(f"for scale, one layer's base matmuls with {args.adapters} rows: {took * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
