"""Segmented LoRA over paged weights: ``y += sum_k c_k * s_k * B_k (R_k (A_k x))``, row by row; most
adapters have no R between A and B."""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import MODULES, SITES, AdapterTable

__all__ = ["AdapterTable", "MODULES", "Runs", "SITES", "add_lora"]


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    *,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    site: str,
) -> None:
    """Add every row's own low-rank updates to ``y`` in place.

    ``x`` is [T, in] and ``y`` [T, sum of the site's out widths], module after module; both
    contiguous and of one dtype. ``arena`` is the pool, 1-D uint8. Rows at and after
    ``runs.row_start[-1]`` are padding and stay as they are. The number of kernel calls does not
    depend on the number of adapters, and a row's bits depend only on its own input and adapters.

    The scheme is S-LoRA's (arXiv 2311.03285) with Punica's segments (arXiv 2310.18547): shrink
    writes one small vector per (row, entry), expand has one writer per output element.
    """
    _check(y, x, arena, table, runs, site)
    if not runs.reaches(table, layer, site):
        return
    implementation(__name__, y).add_lora(y, x, arena, table, runs, layer, site)


def _check(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    site: str,
) -> None:
    in_width, out_width = table.site_widths[site]
    if x.shape[1:] != (in_width,) or y.shape[1:] != (out_width,):
        raise ValueError(
            f"add_lora at {site!r}: x must be [T, {in_width}] and y [T, {out_width}], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if x.shape[0] != y.shape[0] or runs.num_rows > x.shape[0]:
        raise ValueError(
            f"add_lora: runs cover {runs.num_rows} rows, x has {x.shape[0]} and y {y.shape[0]}"
        )
    if x.dtype != y.dtype or not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError("add_lora: x and y must be contiguous and of one dtype")
    if arena.dtype != torch.uint8 or arena.dim() != 1:
        raise ValueError("add_lora: arena must be a 1-D uint8 tensor")
