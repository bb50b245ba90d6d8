"""Segmented LoRA: time over the roofline, beside what one would do without a kernel for it.

    python loadtests/kernels/bench_lora.py [--quick] [--dtype float32|bfloat16|float16]

One layer of the 135M shape (hidden 576, 9/3 heads, inner 1536), all four sites. Rows are divided
evenly among the adapters; 64 adapters of several layers are resident and take turns, so that
weights come from memory and not from a cache. *whole* is ``add_lora`` as it is. There is no call
for a half of it, so *shrink* is ``add_lora`` with outputs of 16 columns and *expand* with inputs of
16: the other half is then next to nothing, but for its launch. Calls come from Python one by one
(on a GPU out of a CUDA graph), and that is in the time: the server on a CPU makes none of them, all
its layers are one compiled call. The roofline is the larger of bytes (the weights of the different
adapters, inputs and outputs) over the read bandwidth and operations over the GEMM rate, both
measured at the start. Compared with, each on contiguous weights laid out for it:

    bmm     one torch.bmm per factor and module over all adapters (possible since ranks are equal)
    each    a matmul per factor, module and adapter
    rows    a matmul per factor, module and row
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from itertools import cycle, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

import report
import roofline
import throughput
import torch

from loramux_kernels.jit import set_num_threads
from loramux_kernels.lora import MODULES, SITES, Runs, add_lora
from loramux_kernels.testing import Weights, make_resident, random_weights

HIDDEN, KV, INNER = 576, 192, 1536
WIDTHS = dict.fromkeys(MODULES, (HIDDEN, HIDDEN)) | {
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
NARROW = 16
PARTS: dict[str, Mapping[str, tuple[int, int]]] = {
    "whole": WIDTHS,
    "shrink": {name: (a, NARROW) for name, (a, _) in WIDTHS.items()},
    "expand": {name: (NARROW, b) for name, (_, b) in WIDTHS.items()},
}
RESIDENT = 64
ROWS = (1, 8, 32, 128, 512)
RANKS = (8, 16, 64, 128)
ADAPTERS = (1, 8, 64)
ROWS_ONE_BY_ONE = 128
"""More rows than this are not worth the time that a loop over them takes."""


def minimum(widths: Mapping[str, tuple[int, int]], site: str, rows: int, rank: int, n: int) -> Any:
    """Elements of weights, elements of x and y, operations: what a site's call cannot avoid."""
    ins_outs = [widths[MODULES[m]] for m in SITES[site]]
    per_rank = sum(a + b for a, b in ins_outs)
    moved = rows * (ins_outs[0][0] + 2 * sum(b for _, b in ins_outs))
    return n * rank * per_rank, moved, 2 * rows * rank * per_rank


class Part:
    """64 resident adapters of one rank, for the whole operation or a half of it."""

    def __init__(self, name: str, rank: int, dtype: torch.dtype, line: roofline.Roofline) -> None:
        self.line = line
        self._widths = PARTS[name]
        self._rank = rank
        self._dtype = dtype
        # The fewer ranks a layer has, the more layers, or the caches would hold all of it.
        self._layers = max(RANKS) // rank * (1 if name == "whole" else 2)
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            random_weights(
                self._widths,
                lambda *_: rank,
                num_layers=self._layers,
                dtype=dtype,
                generator=generator,
                integers=False,
            )
            for _ in range(RESIDENT)
        ]
        self._arena, self._table, self._slots = make_resident(
            self.weights,
            self._widths,
            num_layers=self._layers,
            slice_bytes=24576,
            chunk=16,
            device=line.device,
        )

    def measure(self, rows: int, adapters: int) -> dict[str, dict[str, float]]:
        """Seconds and roofline of each site's call."""
        turns = [
            Runs.build(
                [rows // adapters] * adapters,
                [[(slot, 1.0)] for slot in self._slots[first : first + adapters]],
            )
            for first in range(0, RESIDENT, adapters)
        ]
        found = {}
        for site in SITES:
            weights, moved, operations = minimum(self._widths, site, rows, self._rank, adapters)
            size = weights * self._dtype.itemsize + moved * self.line.dtype.itemsize
            found[site] = {
                "seconds": self._site_s(site, rows, turns),
                "roofline": self.line.seconds(size, operations),
            }
        return found

    def _site_s(self, site: str, rows: int, turns: list[Runs]) -> float:
        device, dtype = self.line.device, self.line.dtype
        width_in, width_out = self._table.site_widths[site]
        x = torch.randn(rows, width_in, device=device).to(dtype)
        y = torch.zeros(rows, width_out, device=device, dtype=dtype)
        where: dict[str, Any] = {"arena": self._arena, "table": self._table, "site": site}
        turn = cycle(product(range(self._layers), turns))

        def call() -> None:
            layer, runs = next(turn)
            add_lora(y, x, **where, runs=runs, layer=layer)

        for _ in turns:  # on a GPU every Runs goes to the device once, before it is captured
            call()
        return roofline.seconds(call, device)


class Baselines:
    """The ways without a kernel, over contiguous weights in the dtype of x."""

    def __init__(self, weights: list[Weights], line: roofline.Roofline) -> None:
        self._line = line
        self._layers = 1 + max(layer for layer, _ in weights[0].matrices)
        self._stacks = [
            [
                tuple(
                    torch.stack([w.matrices[layer, m][side] for w in weights])
                    .to(line.device, line.dtype)
                    .contiguous()
                    for side in (0, 1)
                )
                for m in range(len(MODULES))
            ]
            for layer in range(self._layers)
        ]

    def seconds(self, rows: int, adapters: int) -> dict[str, float | None]:
        """Seconds for a layer."""
        device, dtype = self._line.device, self._line.dtype
        each = rows // adapters
        xs = [torch.randn(rows, a, device=device).to(dtype) for a, _ in WIDTHS.values()]
        ys = [torch.zeros(rows, b, device=device, dtype=dtype) for _, b in WIDTHS.values()]

        def over(one: Callable[..., None]) -> float:
            turn = cycle(product(self._stacks, range(0, RESIDENT, adapters)))

            def layer() -> None:
                stacks, first = next(turn)
                for (a, b), x, y in zip(stacks, xs, ys, strict=True):
                    one(a[first : first + adapters], b[first : first + adapters], x, y)

            return roofline.seconds(layer, device)

        def bmm(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
            h = torch.bmm(x.view(adapters, each, -1), a.transpose(1, 2))
            y.view(adapters, each, -1).baddbmm_(h, b)

        def per_adapter(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
            for i in range(adapters):
                part = slice(i * each, (i + 1) * each)
                y[part].addmm_(torch.mm(x[part], a[i].T), b[i])

        def per_row(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
            for row in range(rows):
                i = row // each
                y[row : row + 1].addmm_(torch.mm(x[row : row + 1], a[i].T), b[i])

        return {
            "bmm": over(bmm),
            "each": over(per_adapter),
            "rows": over(per_row) if rows <= ROWS_ONE_BY_ONE else None,
        }


def case(
    parts: dict[str, Part], others: Baselines, rank: int, rows: int, adapters: int
) -> dict[str, Any]:
    """A line of the table: a layer's four sites."""
    sites = {name: part.measure(rows, adapters) for name, part in parts.items()}
    total = {
        name: {key: sum(site[key] for site in found.values()) for key in ("seconds", "roofline")}
        for name, found in sites.items()
    }
    whole = total["whole"]["seconds"]
    return {
        "rank": rank,
        "rows": rows,
        "adapters": adapters,
        "us": 1e6 * whole,
        "roofline_us": 1e6 * total["whole"]["roofline"],
        **{f"{name}_ratio": t["seconds"] / t["roofline"] for name, t in total.items()},
        **{
            f"{name}_over": None if s is None else s / whole
            for name, s in others.seconds(rows, adapters).items()
        },
        "sites_us": {
            name: {site: {k: 1e6 * v for k, v in t.items()} for site, t in found.items()}
            for name, found in sites.items()
        },
    }


COLUMNS = {
    "rank": "rank",
    "rows": "rows",
    "adapters": "adapters",
    "us": "a layer, µs",
    "roofline_us": "roofline",
    "whole_ratio": "time / roofline",
    "shrink_ratio": "shrink alone",
    "expand_ratio": "expand alone",
    "bmm_over": "bmm / ours",
    "each_over": "a matmul per adapter / ours",
    "rows_over": "a matmul per row / ours",
}


def draw_plot(cases: list[dict[str, Any]], where: Any, name: str) -> None:
    counts = sorted({c["adapters"] for c in cases})
    title = f"LoRA of one layer, {name}: time over roofline"
    with report.plot(where, f"lora-{name}", panels=len(counts), title=title) as axes:
        for axis, count in zip(axes, counts, strict=True):
            for rank in sorted({c["rank"] for c in cases}):
                mine = [c for c in cases if c["adapters"] == count and c["rank"] == rank]
                ratios = [c["whole_ratio"] for c in mine]
                axis.plot([c["rows"] for c in mine], ratios, marker="o", label=f"rank {rank}")
            axis.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
            axis.set(xscale="log", yscale="log", xlabel="rows", title=f"adapters: {count}")
        axes[0].set_ylabel("time / roofline")
        axes[0].legend(frameon=False)


def main() -> None:
    parser: argparse.ArgumentParser = report.arguments(__doc__)
    parser.add_argument("--device", default=roofline.default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    set_num_threads(args.threads)
    ranks, all_rows, counts = RANKS, ROWS, ADAPTERS
    if args.quick:
        ranks, all_rows, counts = (16,), (1, 8), (1, 8)
    rows_dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    dtype = getattr(torch, args.dtype) if args.dtype else rows_dtype
    line = roofline.measure(args.device, rows_dtype)
    found = throughput.header()
    found["machine"] |= line.describe()
    for rank in ranks:
        parts = {name: Part(name, rank, dtype, line) for name in PARTS}
        others = Baselines(parts["whole"].weights, line)
        for rows in all_rows:
            for adapters in (n for n in counts if n <= rows):
                found["cases"].append(case(parts, others, rank, rows, adapters))
                last = report.markdown(found["cases"][-1:], COLUMNS).splitlines()[-1]
                print(last, flush=True)
    where = report.folder(args)
    name = f"{args.device}-{str(dtype).removeprefix('torch.')}"
    report.save(found, where, f"kernels-lora-{name}")
    print("\n" + report.markdown(found["cases"], COLUMNS))
    draw_plot(found["cases"], where, name)


if __name__ == "__main__":
    main()
