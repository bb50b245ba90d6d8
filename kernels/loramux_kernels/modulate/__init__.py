"""What adapters do to a module beside low-rank pairs, on the base's raw output ``W x`` and its
input: ``y *= 1 + sum_k c_k gain_k``, ``y += sum_k c_k shift_k``; ``x *= 1 + sum_k c_k gain_k``.

DoRA's magnitudes (arXiv 2402.09353), IA3's scales (arXiv 2205.05638) and trained biases are these.
"""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import GAIN, INPUT_GAIN, SHIFT, TABLE_SITES, AdapterTable

__all__ = ["modulate_inputs", "modulate_outputs"]

_OUTPUTS, _INPUTS = 0, 1


def modulate_outputs(
    y: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    site: str,
) -> None:
    """Apply every row's own gains and shifts to ``y`` ([T, sum of the site's out widths],
    contiguous) in place, before pairs or a bias are added. Rows without any keep their bits."""
    _check(y, table.site_widths[site][1], runs)
    if runs.modulated(table)[layer, list(TABLE_SITES).index(site), _OUTPUTS]:
        modulate = implementation(__name__, y).modulate
        modulate(y, arena, table, runs, layer, TABLE_SITES[site], table.out_width, (GAIN, SHIFT))


def modulate_inputs(
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
    layer: int,
    site: str,
) -> None:
    """Apply every row's own input gains to ``x`` ([T, in], contiguous), the input of the site's
    only module, in place. ValueError for a site whose modules share their input."""
    _check(x, table.site_widths[site][0], runs)
    if runs.modulated(table)[layer, list(TABLE_SITES).index(site), _INPUTS]:
        if len(TABLE_SITES[site]) > 1:
            raise ValueError(f"modulate_inputs: the modules of {site!r} share their input")
        modulate = implementation(__name__, x).modulate
        modulate(x, arena, table, runs, layer, TABLE_SITES[site], table.in_width, (INPUT_GAIN, -1))


def _check(values: torch.Tensor, width: int, runs: Runs) -> None:
    if values.shape[1:] != (width,) or not values.is_contiguous():
        raise ValueError(f"modulate: needs contiguous [T, {width}], got {list(values.shape)}")
    if runs.num_rows > values.shape[0]:
        raise ValueError(f"modulate: runs cover {runs.num_rows} rows of {values.shape[0]}")
