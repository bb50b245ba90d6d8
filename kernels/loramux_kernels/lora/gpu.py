"""Segmented LoRA in Triton: a shrink and an expand launch for a site, whatever the adapters.

There are two of each, and ``lora.work`` says which rows take which: *rows* kernels multiply and add
along one row (bound by memory: every weight is used once), *tiles* kernels give 16 rows at a time
to the tensor cores. The grid is fixed; programs walk lists whose lengths lie on the device, so that
a CUDA graph replays with any adapters. Neither splits the inner dimension: tiles of few ranks make
enough work for a lone row, and nothing has to be added up across programs.

Everything is widened to fp32 on load and narrowed on store. Half-precision values fit TF32's
mantissa, so the tensor cores multiply them exactly; anything wider takes three TF32 products.

Where an adapter of the batch has a middle, a launch between the two applies it; a recorded graph
has none.
"""

from __future__ import annotations

from typing import Any

import torch

from loramux_kernels import dispatch
from loramux_kernels.lora import middle, one_row, tiles
from loramux_kernels.lora.runs import ROW_BLOCK, Runs
from loramux_kernels.lora.table import TABLE_MODULES, TABLE_SITES, AdapterTable
from loramux_kernels.lora.work import COUNTED, RANK_TILE, LoraWork, lora_work
from loramux_kernels.mirror import mirror, scratch
from loramux_kernels.tuning import Launch, num_programs, table_of


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    site: str,
) -> None:
    """See :func:`loramux_kernels.lora.add_lora`."""
    work, step = on_device(runs, table, y.device)
    h = m = scratch("lora_h", y.device, work.h_elements)
    if runs.has_middle(table, layer, site):
        m = torch.empty(work.h_elements, dtype=torch.float32, device=y.device)
    where, modules = table.tensors, TABLE_SITES[site]
    in_width, row_width = table.site_widths[site]
    widths = [int(table.out_width[module]) for module in modules] + [0, 0]
    weights = (arena, where["slices"], where["list_start"], where["dtype"])
    entries = (step["lora_slot"], step["lora_first_row"], step["lora_pitch"], step["lora_h_start"])
    shape = {
        "LAYERS": table.num_layers,
        "FIRST_MODULE": modules[0],
        "MODULES": len(modules),
        "TABLE": len(TABLE_MODULES),
        "SLICE_BYTES": table.slice_bytes,
        "CHUNK": table.chunk,
    }
    columns = {"ROW_WIDTH": row_width, "OUT0": widths[0], "OUT1": widths[1], "OUT2": widths[2]}
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    tuned = table_of(y.device)

    def shrink(kernel: Any, name: str, launch: Launch, **constants: Any) -> None:
        dispatch.calls[f"gpu:{name}"] += 1
        kernel[(num_programs(launch, y.device),)](
            h, x, *weights, where["a_offset"], where["rank"], where["scale"], *entries,
            step["lora_scale"], step[name], step["lora_counts"], layer,
            WIDTH=in_width, **shape, **constants,
            **launch.options,
        )  # fmt: skip
        if m is not h:
            between(name, constants["RANKS"])

    def between(name: str, ranks: int) -> None:
        dispatch.calls[f"gpu:middle_of_{name}"] += 1
        middle.middle_kernel[(num_programs(middle.LAUNCH, y.device),)](
            m, h, *weights, where["middle_offset"], where["rank"], *entries,
            step[name], step["lora_counts"], layer,
            LIST=COUNTED.index(name), RANKS=ranks, **shape, **middle.LAUNCH.options,
        )  # fmt: skip

    def expand(kernel: Any, name: str, launch: Launch, **constants: Any) -> None:
        dispatch.calls[f"gpu:{name}"] += 1
        kernel[(num_programs(launch, y.device),)](
            y, m, *weights, where["b_offset"], where["rank"], *entries,
            step["lora_entry_start"], step[name], step["lora_counts"], layer,
            **columns, **shape, RANKS=RANK_TILE, **constants,
            **launch.options,
        )  # fmt: skip

    if work.any_rows:
        launch = tuned.launch("shrink_rows", in_width)
        shrink(
            one_row.shrink_rows_kernel,
            "shrink_rows",
            launch,
            RANKS=tuned.lone_ranks,
            CHUNKS=launch.block,
        )
        expand(one_row.expand_rows_kernel, "expand_rows", tuned.launch("expand_rows", row_width))
    if work.any_tiles:
        launch = tuned.launch("shrink_tiles", in_width)
        constants = {"RANKS": RANK_TILE, "ROWS": ROW_BLOCK, "PRECISION": precision}
        block = min(launch.block, table.chunk)
        shrink(tiles.shrink_tiles_kernel, "shrink_tiles", launch, BLOCK=block, **constants)
        launch = tuned.launch("expand_tiles", row_width)
        expand(tiles.expand_tiles_kernel, "expand_tiles", launch, ROWS=ROW_BLOCK)


def on_device(
    runs: Runs, table: AdapterTable, device: torch.device
) -> tuple[LoraWork, dict[str, torch.Tensor]]:
    """The step's work and its arrays on ``device``, brought there now unless ``bind`` did."""
    if runs.on_device is None:
        tuned = table_of(device)
        work = lora_work(runs, table, lone_rows=tuned.lone_rows, lone_ranks=tuned.lone_ranks)
        runs.bind(work, mirror(work.arrays, device))
    assert runs.on_device is not None
    return runs.on_device
