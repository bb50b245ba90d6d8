"""Segmented LoRA: exact against dense matmuls, ragged, row-invariant, without copies."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from loramux_kernels import dispatch
from loramux_kernels.lora import MODULES, SITES, AdapterTable, Runs, add_lora
from loramux_kernels.lora.table import TABLE_MODULES
from loramux_kernels.testing import (
    Weights,
    assert_close,
    assert_same,
    counting,
    dense_lora,
    integer_tensor,
    make_resident,
    ragged_segments,
    random_weights,
)

torch.set_num_threads(1)

LAYERS = 2
SHAPE = (1, len(TABLE_MODULES))
# Grouped-query widths; 24, 8 and 40 are no multiples of a chunk, so vectors are padded.
WIDTHS = {name: (24, 24) for name in MODULES}
WIDTHS |= {"k_proj": (24, 8), "v_proj": (24, 8), "down_proj": (40, 24)}
WIDTHS |= {"gate_proj": (24, 40), "up_proj": (24, 40)}
# Wide enough for whole blocks of lanes, columns and rows, with a tail in each.
WIDE = {name: (600, 600) for name in MODULES}
WIDE |= {"k_proj": (600, 72), "v_proj": (600, 72), "down_proj": (104, 600)}
WIDE |= {"gate_proj": (600, 104), "up_proj": (600, 104)}


def adapters(widths: dict[str, tuple[int, int]], *, integers: bool = True) -> list[Weights]:
    """Every dtype; odd ranks, absent modules, an empty layer, and a rank above one tile. Then the
    same with middles."""
    generator = torch.Generator().manual_seed(7)
    ranks = [
        (torch.bfloat16, lambda layer, module: (1, 3, 5, 0, 2, 4, 7)[module]),
        (torch.float16, lambda layer, module: layer * (module % 3) * 4),
        (torch.float32, lambda layer, module: 9),
        (torch.bfloat16, lambda layer, module: 33 if module in (0, 6) else 0),
    ]
    return [
        random_weights(
            widths,
            rank,
            num_layers=LAYERS,
            dtype=dtype,
            generator=generator,
            integers=integers,
            middles=middles,
        )
        for middles in (False, True)
        for dtype, rank in ranks
    ]


def check(
    widths: dict[str, tuple[int, int]],
    slice_bytes: int,
    backend: dispatch.Backend,
    rows: list[int],
    lists: list[list[tuple[int, float]]],
) -> None:
    weights = adapters(widths)
    arena, table, slots = make_resident(
        weights, widths, num_layers=LAYERS, slice_bytes=slice_bytes, chunk=16
    )
    runs = Runs.build(rows, [[(slots[i], c) for i, c in entries] for entries in lists])
    generator = torch.Generator().manual_seed(1)
    padding = 2
    for layer in range(LAYERS):
        for site in SITES:
            in_width, out_width = table.site_widths[site]
            x = integer_tensor(sum(rows) + padding, in_width, generator=generator)
            y = integer_tensor(sum(rows) + padding, out_width, generator=generator)
            expected, end = [], 0
            for count, entries in zip(rows, lists, strict=True):
                part = slice(end, end + count)
                end += count
                chosen = [(weights[i], c) for i, c in entries]
                expected.append(dense_lora(y[part], x[part], chosen, layer, site))
            expected.append(y[end:].clone())
            with dispatch.using(backend):
                add_lora(y, x, arena=arena, table=table, runs=runs, layer=layer, site=site)
            assert_same(y, torch.cat(expected))


BATCHES = {
    "one row": ([1], [[(0, 2.0)]]),
    "the last adapter alone": ([1], [[(3, 1.0)]]),
    "base rows beside adapter rows": ([2, 1, 3], [[], [(1, 1.0)], []]),
    "empty runs": ([0, 2, 0, 1], [[(0, 1.0)], [(2, 1.0)], [], [(1, 0.5)]]),
    "several entries in one run": ([3, 2], [[(0, 1.0), (2, 2.0), (3, -0.5)], [(2, 1.0), (0, 1.0)]]),
    "the same adapter twice in a list": ([2], [[(1, 1.0), (1, 0.25)]]),
    "runs longer than a block": ([37, 1, 18], [[(0, 1.0)], [(1, 1.0)], [(2, 1.0), (1, 4.0)]]),
    "base rows only": ([4], [[]]),
    "one row with a middle": ([1], [[(7, 1.0)]]),
    "middles in every dtype": ([2, 1, 18], [[(4, 1.0)], [(5, 2.0)], [(6, 1.0), (7, 0.5)]]),
    "middles beside none": ([3, 5, 17], [[(4, 1.0), (0, 1.0)], [(3, 1.0)], [(1, 1.0), (7, 1.0)]]),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_dense_matmuls_exactly(batch: str, backend: dispatch.Backend) -> None:
    check(WIDTHS, 256, backend, *BATCHES[batch])


@pytest.mark.parametrize("slice_bytes", [64, 320, 1024, 1 << 20])
def test_vectors_that_cross_slices(slice_bytes: int) -> None:
    check(WIDE, slice_bytes, "cpu", *BATCHES["runs longer than a block"])
    check(WIDE, slice_bytes, "cpu", *BATCHES["several entries in one run"])
    check(WIDE, slice_bytes, "cpu", *BATCHES["middles beside none"])


def test_empty_batch() -> None:
    check(WIDTHS, 256, "cpu", [], [])


def test_real_values_agree_with_float64() -> None:
    weights = adapters(WIDE, integers=False)
    arena, table, slots = make_resident(
        weights, WIDE, num_layers=LAYERS, slice_bytes=1024, chunk=16
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 600, generator=generator)
    y = torch.zeros(5, 744)
    runs = Runs.build([5], [[(slots[0], 1.0), (slots[2], 0.3)]])
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=1, site="qkv")
    expected = torch.zeros(5, 744, dtype=torch.float64)
    column = 0
    for module in SITES["qkv"]:
        for index, c in ((0, 1.0), (2, 0.3)):
            a, b = (m.double() for m in weights[index].matrices[1, module])
            width = b.shape[1]
            expected[:, column : column + width] += c * 0.5 * ((x.double() @ a.T) @ b)
        column += width
    assert_close(
        y.double(),
        expected,
        rtol=0,
        atol=2e-5,
        because="fp32 sums of 600 products of magnitude 1/8, then of 14 of magnitude 3",
    )


def test_a_rows_bits_do_not_depend_on_the_batch() -> None:
    weights = adapters(WIDE, integers=False)
    arena, table, slots = make_resident(
        weights, WIDE, num_layers=LAYERS, slice_bytes=1024, chunk=16
    )
    generator = torch.Generator().manual_seed(3)
    random = np.random.default_rng(3)
    mine = [(slots[0], 1.0), (slots[2], 0.7), (slots[7], 0.3)]
    others = [[], [(slots[1], 1.0)], [(slots[3], 0.2), (slots[0], 1.0)], [(slots[7], 1.0)]]
    row = {site: torch.randn(1, table.site_widths[site][0], generator=generator) for site in SITES}

    def bits(site: str, before: int, beside: int, after: int) -> torch.Tensor:
        lists = [others[random.integers(4)], mine, others[random.integers(4)]]
        runs = Runs.build([before, beside + 1, after], lists)
        in_width, out_width = table.site_widths[site]
        x = torch.randn(before + beside + 1 + after, in_width, generator=generator)
        at = before + int(random.integers(beside + 1))
        x[at] = row[site]
        numba.set_num_threads(int(random.integers(numba.config.NUMBA_NUM_THREADS)) + 1)
        y = torch.ones(len(x), out_width)
        add_lora(y, x, arena=arena, table=table, runs=runs, layer=1, site=site)
        return y[at]

    alone = {site: bits(site, 0, 0, 0) for site in SITES}
    for _ in range(200):
        site = str(random.choice(list(SITES)))
        before, beside, after = (int(n) for n in random.integers(0, 20, 3))
        assert torch.equal(bits(site, before, beside, after), alone[site])


def test_a_rows_bits_do_not_depend_on_where_its_adapter_lies() -> None:
    weights = adapters(WIDE, integers=False)
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(4))
    seen = []
    for seed in range(5):
        arena, table, slots = make_resident(
            weights, WIDE, num_layers=LAYERS, slice_bytes=1024, chunk=16, seed=seed
        )
        y = torch.zeros(3, 744)
        runs = Runs.build([3], [[(slots[0], 1.0)]])
        add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
        seen.append(y)
    assert all(torch.equal(y, seen[0]) for y in seen)


def test_a_middle_beside_it_shows_in_no_row_without_one() -> None:
    weights = adapters(WIDE, integers=False)
    arena, table, slots = make_resident(
        weights, WIDE, num_layers=LAYERS, slice_bytes=1024, chunk=16
    )
    x = torch.randn(6, 600, generator=torch.Generator().manual_seed(5))
    seen = []
    for beside in ([], [(slots[2], 1.0)], [(slots[6], 1.0)]):
        y = torch.zeros(6, 744)
        runs = Runs.build([4, 2], [[(slots[0], 1.0), (slots[3], 0.5)], beside])
        add_lora(y, x, arena=arena, table=table, runs=runs, layer=1, site="qkv")
        seen.append(y)
    assert all(torch.equal(y[:4], seen[0][:4]) for y in seen)
    assert not torch.equal(seen[1], seen[2])


def test_adapters_over_the_same_slices_share_a_and_b() -> None:
    """Two lists that begin with the slices of one basis; behind them what is each one's own."""
    generator = torch.Generator().manual_seed(9)
    basis = random_weights(
        WIDTHS, lambda *_: 5, num_layers=1, dtype=torch.float32, generator=generator
    )
    arena, table, (slot,) = make_resident([basis], WIDTHS, num_layers=1, slice_bytes=256, chunk=16)
    count = len(arena) // 256 - 4
    start = int(table.list_start[slot])
    shared = table.slices[start : start + count].copy()
    middles = [integer_tensor(5, 5, generator=generator) for _ in range(2)]
    own = torch.full((2, 512), float("nan"))
    own[:, : 5 * 16] = torch.stack([pad(middle, (0, 11)).reshape(-1) for middle in middles])
    arena = torch.cat([arena, own.view(torch.uint8).reshape(-1)])
    size = len(arena) - own.nbytes
    places = [
        table.add(
            slices=np.append(shared, size + 2048 * index + 256 * np.arange(8)),
            a_offset=table.a_offset[slot].copy(),
            b_offset=table.b_offset[slot].copy(),
            middle_offset=np.where(table.rank[slot] > 0, count * 64, -1),
            rank=table.rank[slot].copy(),
            scale=table.scale[slot].copy(),
            dtype=torch.float32,
        )
        for index in range(2)
    ]
    x = integer_tensor(5, 24, generator=generator)
    y = torch.zeros(5, 40)
    runs = Runs.build([2, 3], [[(place, 1.0)] for place in places])
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    everywhere = [dict.fromkeys(basis.matrices, middle) for middle in middles]
    expected = [
        dense_lora(torch.zeros(len(rows), 40), rows, [(replace(basis, middles=m), 1.0)], 0, "qkv")
        for rows, m in zip((x[:2], x[2:]), everywhere, strict=True)
    ]
    assert_same(y, torch.cat(expected))


def test_nan_stays_in_its_row() -> None:
    weights = adapters(WIDTHS)
    arena, table, slots = make_resident(
        weights, WIDTHS, num_layers=LAYERS, slice_bytes=256, chunk=16
    )
    x = torch.ones(6, 24)
    x[2, 23] = float("nan")
    y = torch.zeros(6, 40)
    runs = Runs.build([6], [[(slots[2], 1.0)]])
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    assert torch.isnan(y[2]).all()
    assert torch.isfinite(y[[0, 1, 3, 4, 5]]).all()


def test_one_call_whatever_the_number_of_adapters() -> None:
    generator = torch.Generator().manual_seed(5)
    many = [
        random_weights(
            WIDTHS, lambda *_: 2, num_layers=1, dtype=torch.bfloat16, generator=generator
        )
        for _ in range(32)
    ]
    arena, table, slots = make_resident(many, WIDTHS, num_layers=1, slice_bytes=256, chunk=16)
    seen = []
    for count in (1, 32):
        runs = Runs.build([1] * count, [[(slot, 1.0)] for slot in slots[:count]])
        x, y = torch.ones(count, 24), torch.zeros(count, 40)
        with counting() as calls:
            add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
        seen.append(calls)
    assert seen[0] == seen[1] == {"cpu:add_lora": 1}


def test_a_step_copies_no_weights() -> None:
    generator = torch.Generator().manual_seed(6)
    weights = random_weights(
        WIDE, lambda *_: 64, num_layers=1, dtype=torch.float32, generator=generator
    )
    arena, table, slots = make_resident([weights], WIDE, num_layers=1, slice_bytes=4096, chunk=16)
    runs = Runs.build([1], [[(slots[0], 1.0)]])
    x, y = torch.ones(1, 600), torch.zeros(1, 744)
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    tracemalloc.start()
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_384 and arena.numel() > 1_500_000
    # What is not copied is read where it lies: a changed byte shows at once.
    arena.zero_()
    before = y.clone()
    add_lora(y, x, arena=arena, table=table, runs=runs, layer=0, site="qkv")
    assert torch.equal(y, before)


def test_warm_up_loads_every_cpu_kernel() -> None:
    dispatch.warm_up()
    for operation in ("attention", "lora", "norm"):
        assert f"loramux_kernels.{operation}.cpu" in sys.modules


def test_a_site_nobody_changes_costs_no_call() -> None:
    weights = random_weights(
        WIDTHS,
        lambda layer, module: 4 if module == 0 else 0,
        num_layers=1,
        dtype=torch.float32,
        generator=torch.Generator(),
    )
    arena, table, slots = make_resident([weights], WIDTHS, num_layers=1, slice_bytes=256, chunk=16)
    runs = Runs.build([1], [[(slots[0], 1.0)]])
    with counting() as calls:
        add_lora(
            torch.zeros(1, 24),
            torch.zeros(1, 24),
            arena=arena,
            table=table,
            runs=runs,
            layer=0,
            site="o",
        )
    assert not calls


def test_blocks_cover_every_row_of_every_entry() -> None:
    generator = torch.Generator().manual_seed(8)
    for _ in range(50):
        rows = ragged_segments(90, 7, generator=generator)
        lists = [[(0, 1.0)] * (i % 3) for i in range(7)]
        runs = Runs.build(rows, lists)
        covered = [0] * len(runs.slot)
        for entry, row in zip(runs.entry_block, runs.entry_block_row, strict=True):
            end = runs.row_start[runs.run_of_entry[entry] + 1]
            covered[entry] += min(16, end - row)
        assert covered == [rows[i] for i in range(7) for _ in lists[i]]
        assert runs.pair_start[-1] == sum(covered)


class TestAdapterTable:
    def table(self) -> AdapterTable:
        return AdapterTable(num_layers=1, widths=WIDTHS, slice_bytes=256, chunk=16, device="cpu")

    def add(self, table: AdapterTable, slices: int, rank: int = 1, offset: int = 0) -> int:
        where = np.full(SHAPE, offset, dtype=np.int64)
        return table.add(
            slices=np.arange(slices, dtype=np.int64) * 256,
            a_offset=where,
            b_offset=where,
            rank=np.full(SHAPE, rank, dtype=np.int32),
            scale=np.ones(SHAPE, dtype=np.float32),
            dtype=torch.float32,
        )

    def test_slots_and_lists_are_reused(self) -> None:
        table = self.table()
        slots = [self.add(table, slices) for slices in (3, 5, 2, 9)]
        assert len(set(slots)) == 4
        size = len(table.slices)
        table.remove(slots[1])
        assert self.add(table, 5) == slots[1]
        assert len(table.slices) == size
        for _ in range(20):
            slots.append(self.add(table, 1))
        assert len(set(slots)) == 24
        ranges = sorted(
            (int(table.list_start[s]), n) for s, n in zip(slots[:4], (3, 5, 2, 9), strict=True)
        )
        assert all(a + n <= b for (a, n), (b, _) in zip(ranges, ranges[1:], strict=False))

    def test_removed_twice(self) -> None:
        table = self.table()
        slot = self.add(table, 1)
        table.remove(slot)
        with pytest.raises(KeyError, match=f"slot {slot} holds no adapter"):
            table.remove(slot)

    def test_matrix_outside_the_stream(self) -> None:
        with pytest.raises(ValueError, match="a_offset of layer 0 q_proj lies outside"):
            self.add(self.table(), 1, rank=3)

    @pytest.mark.parametrize(("offset", "rank"), [(64, 1), (8, 1), (-16, 1), (0, 0)])
    def test_middle_outside_the_stream(self, offset: int, rank: int) -> None:
        table = self.table()
        with pytest.raises(ValueError, match="middle_offset of layer 0 q_proj lies outside"):
            table.add(
                slices=np.zeros(1, np.int64),
                a_offset=np.zeros(SHAPE, np.int64),
                b_offset=np.zeros(SHAPE, np.int64),
                middle_offset=np.full(SHAPE, offset),
                rank=np.full(SHAPE, rank, np.int32),
                scale=np.ones(SHAPE, np.float32),
                dtype=torch.float32,
            )

    def test_offset_inside_a_chunk(self) -> None:
        with pytest.raises(ValueError, match="off a chunk of 16"):
            self.add(self.table(), 9, offset=8)

    def test_wrong_array(self) -> None:
        with pytest.raises(ValueError, match=r"rank must be int32 \[1, 12\], got int64"):
            self.table().add(
                slices=np.zeros(1, dtype=np.int64),
                a_offset=np.zeros(SHAPE, dtype=np.int64),
                b_offset=np.zeros(SHAPE, dtype=np.int64),
                rank=np.zeros(SHAPE, dtype=np.int64),  # type: ignore[arg-type]
                scale=np.zeros(SHAPE, dtype=np.float32),
                dtype=torch.float32,
            )

    def test_dtype_nobody_widens(self) -> None:
        with pytest.raises(ValueError, match="dtype torch.int8"):
            self.table().add(
                slices=np.zeros(1, dtype=np.int64),
                a_offset=np.zeros(SHAPE, dtype=np.int64),
                b_offset=np.zeros(SHAPE, dtype=np.int64),
                rank=np.zeros(SHAPE, dtype=np.int32),
                scale=np.zeros(SHAPE, dtype=np.float32),
                dtype=torch.int8,
            )

    def test_chunk_must_divide_a_slice(self) -> None:
        with pytest.raises(ValueError, match=r"chunk \(48\)"):
            AdapterTable(num_layers=1, widths=WIDTHS, slice_bytes=256, chunk=48, device="cpu")


def test_wrong_shapes_are_named() -> None:
    arena, table, _ = make_resident(
        adapters(WIDTHS), WIDTHS, num_layers=LAYERS, slice_bytes=256, chunk=16
    )
    runs = Runs.build([1], [[]])
    with pytest.raises(ValueError, match=r"x must be \[T, 24\] and y \[T, 40\]"):
        add_lora(
            torch.zeros(1, 39),
            torch.zeros(1, 24),
            arena=arena,
            table=table,
            runs=runs,
            layer=0,
            site="qkv",
        )
