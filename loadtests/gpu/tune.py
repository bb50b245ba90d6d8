"""Measures launch settings of the LoRA and attention kernels on this device and writes its table.

    python loadtests/gpu/tune.py            rewrites kernels/loramux_kernels/tuning/sm_<nn>.json

Each kernel's candidates are timed with everything else as it is, over a mix of rows, ranks and
adapters; the least sum of (time / floor) wins. Settings are one for all rows and ranks of a kernel
on purpose: see ``loramux_kernels.tuning``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "kernels"), str(Path(__file__).parent)]

import kernels  # noqa: E402
import torch  # noqa: E402
from timing import Ceilings, ceilings  # noqa: E402

from loramux_kernels import tuning  # noqa: E402
from loramux_kernels.tuning import Launch, Table  # noqa: E402

LONE = [(1, 16, 1), (8, 64, 8), (64, 16, 64), (64, 16, 1)]
"""(rows, rank, adapters) that take the one-row kernels, and those that take the tiles."""
SIDE_BY_SIDE = [(512, 16, 1), (512, 64, 8)]
DECODES = [(1, 1, 1024), (32, 1, 1024), (8, 1, 8192), (1, 512, 512)]

CANDIDATES: dict[str, list[Launch]] = {
    "shrink_rows": [
        Launch(w, 1, p, b, 128)
        for w, p, b in itertools.product((2, 4, 8), (4, 6, 8, 12), (4, 8, 16))
        if w * p <= 32
    ],
    "expand_rows": [
        Launch(w, 1, p, 0, 128) for w, p in itertools.product((2, 4, 8), (4, 8, 16)) if w * p <= 32
    ],
    "shrink_tiles": [
        Launch(4, s, p, b, 168) for s, p, b in itertools.product((2, 3, 4), (2, 3), (32, 64))
    ],
    "expand_tiles": [Launch(4, s, p, 0, 168) for s, p in itertools.product((2, 3, 4), (2, 3))],
    "attention": [
        Launch(w, s, p, b) for w, s, p, b in itertools.product((4, 8), (2, 3), (2, 4), (32, 64))
    ],
}


def cost(kernel: str, ceiling: Ceilings) -> float:
    """Sum of (time / floor) over the cases that ``kernel`` runs in."""
    if kernel == "attention":
        rows = [kernels.attention_row(ceiling, *case) for case in DECODES]
        return sum(row[-1] for row in rows)
    cases = LONE if kernel.endswith("rows") else SIDE_BY_SIDE
    return sum(kernels.our_lora(ceiling, *case)[1] for case in cases)


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    best = dataclasses.replace(tuning.table_of(device), name=name)
    ceiling = ceilings()
    # The tables are looked up by device; each try stands in for the shipped one.
    for kernel, candidates in CANDIDATES.items():
        tried: list[tuple[float, Launch]] = []
        for launch in [best.launch(kernel), *candidates]:
            use(with_launch(best, kernel, launch))
            try:
                tried.append((cost(kernel, ceiling), launch))
            except Exception as error:  # a candidate may not fit the device at all
                print(f"{kernel} {launch}: {error}", flush=True)
        least, launch = min(tried, key=lambda pair: pair[0])
        print(f"{kernel}: {tried[0][0]:.2f} -> {least:.2f} with {launch}", flush=True)
        best = with_launch(best, kernel, launch)
    write(best, torch.cuda.get_device_name(device))


def use(table: Table) -> None:
    """Make every kernel of this process look into ``table``."""
    from loramux_kernels.attention import gpu as attention
    from loramux_kernels.lora import gpu as lora

    attention.table_of = lora.table_of = lambda _: table  # type: ignore[assignment]


def with_launch(table: Table, kernel: str, launch: Launch) -> Table:
    """``table`` with other settings for the narrowest class of ``kernel``."""
    (most, _), *wider = table.kernels[kernel]
    kernels_ = table.kernels | {kernel: ((most, launch), *wider)}
    return dataclasses.replace(table, kernels=kernels_)


def write(table: Table, device: str) -> None:
    """The table as JSON, fields left out where they are what they are anyway."""
    plain = Launch(0, 0)
    document: dict[str, Any] = {
        "about": f"Measured on {device} by loadtests/gpu/tune.py.",
        "lone_rows": table.lone_rows,
        "lone_ranks": table.lone_ranks,
        "kernels": {},
    }
    for kernel, classes in table.kernels.items():
        document["kernels"][kernel] = [
            {"max_width": most}
            | {
                field: value
                for field, value in dataclasses.asdict(launch).items()
                if field in ("warps", "stages") or value != getattr(plain, field)
            }
            for most, launch in classes
        ]
    path = tuning.FOLDER / f"{table.name}.json"
    text = json.dumps(document, indent=2) + "\n"
    tuning.parse(table.name, text)
    path.write_text(text)
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main()
