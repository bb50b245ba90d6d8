"""Gains and shifts: exact, only where they belong, scaled by the request, in any batch the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux_kernels import dispatch
from loramux_kernels.lora import MODULES, SITES, AdapterTable, Runs
from loramux_kernels.lora.table import GAIN, INPUT_GAIN, SHIFT, TABLE_MODULES
from loramux_kernels.modulate import modulate_inputs, modulate_outputs
from loramux_kernels.testing import (
    Weights,
    assert_same,
    counting,
    integer_tensor,
    make_resident,
    random_weights,
)

LAYERS = 2
WIDTHS = {name: (40, 24) for name in MODULES} | {"k_proj": (40, 8), "down_proj": (600, 40)}
ROWS = [3, 1, 2, 40, 1]
# one adapter, the base, two in one list, many rows, and an adapter without any vector
LISTS: list[list[tuple[int, float]]] = [[(0, 1.0)], [], [(1, 2.0), (0, -1.0)], [(1, 0.5)], [(2, 1)]]


def adapters() -> list[Weights]:
    """Two with vectors at some places, and one that is pairs alone."""
    generator = torch.Generator().manual_seed(3)
    plain = [
        random_weights(WIDTHS, lambda *_: 1, num_layers=LAYERS, dtype=dtype, generator=generator)
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    ]
    for index, weights in enumerate(plain[:2]):
        for layer in range(LAYERS):
            for module, name in enumerate(MODULES):
                width_in, width_out = WIDTHS[name]
                for kind, width in ((GAIN, width_out), (SHIFT, width_out), (INPUT_GAIN, width_in)):
                    shared = kind == INPUT_GAIN and name not in ("o_proj", "down_proj")
                    if shared or (layer + module + kind + index) % 3 == 0:
                        continue
                    vector = integer_tensor(width, generator=generator)
                    weights.vectors[layer, module, kind] = vector
    return plain


def resident(
    slice_bytes: int, device: str = "cpu"
) -> tuple[list[Weights], torch.Tensor, AdapterTable, Runs]:
    weights = adapters()
    arena, table, slots = make_resident(
        weights, WIDTHS, num_layers=LAYERS, slice_bytes=slice_bytes, chunk=16, device=device
    )
    runs = Runs.build(ROWS, [[(slots[i], c) for i, c in entries] for entries in LISTS])
    return weights, arena, table, runs


def expected(
    values: torch.Tensor, weights: list[Weights], layer: int, site: str, *, inputs: bool
) -> torch.Tensor:
    kinds = (INPUT_GAIN, None) if inputs else (GAIN, SHIFT)
    out, row = values.clone(), 0
    for rows, entries in zip(ROWS, LISTS, strict=True):
        column = 0
        for module in SITES[site]:
            width = WIDTHS[MODULES[module]][not inputs]
            part = out[row : row + rows, column : column + width]
            factor, added = torch.ones(width), torch.zeros(width)
            for i, c in entries:
                factor += c * weights[i].vectors.get((layer, module, kinds[0]), torch.zeros(width))
                if kinds[1] is not None:
                    place = (layer, module, kinds[1])
                    added += c * weights[i].vectors.get(place, torch.zeros(width))
            part.mul_(factor).add_(added)
            column += width
        row += rows
    return out


@pytest.mark.parametrize("slice_bytes", [64, 320, 1 << 16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_row_gets_its_own(backend: dispatch.Backend, slice_bytes: int) -> None:
    check(backend, slice_bytes)


def check(backend: dispatch.Backend, slice_bytes: int, device: str = "cpu") -> None:
    weights, arena, table, runs = resident(slice_bytes, device)
    generator = torch.Generator().manual_seed(1)
    padded = sum(ROWS) + 2
    for layer in range(LAYERS):
        for site, modules in SITES.items():
            where = {"arena": arena, "table": table, "runs": runs, "layer": layer, "site": site}
            x, y = (integer_tensor(padded, w, generator=generator) for w in table.site_widths[site])
            want = expected(y, weights, layer, site, inputs=False)
            x, y = x.to(device), y.to(device)
            with dispatch.using(backend):
                modulate_outputs(y, **where)
            assert_same(y.cpu(), want)
            if len(modules) == 1:
                want = expected(x.cpu(), weights, layer, site, inputs=True)
                with dispatch.using(backend):
                    modulate_inputs(x, **where)
                assert_same(x.cpu(), want)


def test_rows_without_vectors_keep_every_bit() -> None:
    """Also the sign of a zero: what is beside a row must not show in it."""
    _, arena, table, runs = resident(320)
    y = torch.full((sum(ROWS), table.site_widths["qkv"][1]), -0.0)
    modulate_outputs(y, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    plain = [3, sum(ROWS) - 1]
    assert torch.signbit(y[plain]).all() and (y[plain] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_batch_of_pairs_alone_calls_nothing(backend: dispatch.Backend) -> None:
    _, arena, table, _ = resident(320)
    runs = Runs.build([2, 1], [[(2, 1.0)], []])
    with dispatch.using(backend), counting() as calls:
        for site in SITES:
            y = torch.zeros(3, table.site_widths[site][1])
            modulate_outputs(y, arena=arena, table=table, runs=runs, layer=0, site=site)
    assert not calls


def test_many_rows_have_the_bits_of_one() -> None:
    _, arena, table, _ = resident(320)
    y = torch.randn(30, table.site_widths["down"][1], generator=torch.Generator().manual_seed(0))
    where = {"arena": arena, "table": table, "layer": 1, "site": "down"}
    together, alone = y.clone(), y.clone()
    modulate_outputs(together, runs=Runs.build([30], [[(0, 0.3), (1, 0.7)]]), **where)
    for row in range(30):
        runs = Runs.build([1], [[(0, 0.3), (1, 0.7)]])
        modulate_outputs(alone[row : row + 1], runs=runs, **where)
    assert torch.equal(together, alone)


def test_vectors_outside_the_stream_or_of_half_precision_are_refused() -> None:
    _, _, table, _ = resident(320)
    shape = (LAYERS, len(TABLE_MODULES))
    nothing = np.zeros(shape, np.int64)
    fields = {
        "slices": np.zeros(4, np.int64),
        "a_offset": nothing,
        "b_offset": nothing,
        "rank": np.zeros(shape, np.int32),
        "scale": np.zeros(shape, np.float32),
    }
    offset = np.full((*shape, 3), -1, np.int64)
    offset[1, 2, SHIFT] = 4 * 80 - 16
    with pytest.raises(ValueError, match="a vector of layer 1 v_proj lies outside"):
        table.add(**fields, dtype=torch.float32, vector_offset=offset)
    offset[1, 2, SHIFT] = 0
    with pytest.raises(ValueError, match="must be fp32"):
        table.add(**fields, dtype=torch.bfloat16, vector_offset=offset)
    table.remove(table.add(**fields, dtype=torch.float32, vector_offset=offset))
