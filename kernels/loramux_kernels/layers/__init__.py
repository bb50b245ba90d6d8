"""All decoder layers in one call: ``h += Attention(norm(h)); h += MLP(norm(h))``, each in turn."""

from __future__ import annotations

import torch

from loramux_kernels.attention import Pages
from loramux_kernels.dispatch import implementation
from loramux_kernels.layers.table import LayerTable, Vector, Work
from loramux_kernels.lora import AdapterTable, Runs

__all__ = ["LayerTable", "Vector", "Work", "run_layers"]


def run_layers(
    work: Work,
    layers: LayerTable,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    arena: torch.Tensor,
    pages: Pages,
    table: AdapterTable,
    runs: Runs,
) -> None:
    """Run the rows of ``work.hidden`` through every layer, on a CPU in float32.

    ``work.residual`` holds zeros before; afterwards it and ``work.hidden`` are the two terms of the
    sum that the final norm takes. The other operands are those of ``rope_store``,
    ``paged_attention`` and ``add_lora``, whose bits this call gives.
    """
    rows = work.hidden.shape[0]
    if pages.num_rows != rows or runs.num_rows != rows or positions.shape[0] != rows:
        raise ValueError(
            f"run_layers: {rows} rows of activations, {pages.num_rows} of pages, "
            f"{runs.num_rows} of runs, {positions.shape[0]} positions"
        )
    implementation(__name__, work.hidden).run_layers(
        work, layers, cos, sin, positions, arena, pages, table, runs
    )
