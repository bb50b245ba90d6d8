"""The lists that GPU programs take LoRA work from: everything once, nothing twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from loramux_kernels.lora import MODULES, Runs
from loramux_kernels.lora.work import RANK_TILE, lora_work
from loramux_kernels.testing import make_resident, ragged_segments, random_weights

WIDTHS = {name: (24, 24) for name in MODULES}
RANKS = (1, 16, 17, 40)


def resident():  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    weights = [
        random_weights(
            WIDTHS,
            # the largest rank stands in one module of the last layer alone
            lambda layer, module, most=rank: most if (layer, module) == (1, 6) else module % 2,
            num_layers=2,
            dtype=torch.float32,
            generator=generator,
        )
        for rank in RANKS
    ]
    _, table, slots = make_resident(weights, WIDTHS, num_layers=2, slice_bytes=256, chunk=16)
    return table, slots


@pytest.mark.parametrize("seed", range(5))
def test_every_row_meets_every_rank_of_its_adapters_once(seed: int) -> None:
    table, slots = resident()
    generator = torch.Generator().manual_seed(seed)
    rows = ragged_segments(60, 9, generator=generator)
    lists = [[(slots[(i + j) % 4], 1.0) for j in range(i % 4)] for i in range(9)]
    runs = Runs.build(rows, lists)
    alone = torch.rand(60, generator=generator).numpy() < 0.5
    work = lora_work(runs, table, lone_rows=4, lone_ranks=3, alone=alone)
    run_of_row = np.repeat(np.arange(9), rows)

    shrunk: Counter[tuple[int, int, int]] = Counter()
    for name, size, lone in (("shrink_rows", 3, True), ("shrink_tiles", RANK_TILE, False)):
        for entry, first, count, tile in work.arrays[name].tolist():
            for row in range(first, first + count):
                assert alone[row] == lone and runs.run_of_entry[entry] == run_of_row[row]
                shrunk.update((row, entry, rank) for rank in range(tile * size, (tile + 1) * size))
    tops = {slot: rank for slot, rank in zip(slots, RANKS, strict=True)}
    for row in range(60):
        run = run_of_row[row]
        for entry in range(runs.entry_start[run], runs.entry_start[run + 1]):
            assert all(shrunk[row, entry, rank] == 1 for rank in range(tops[runs.slot[entry]]))

    expanded: Counter[int] = Counter()
    for name, most in (("expand_rows", 4), ("expand_tiles", 16)):
        for run, first, count, _ in work.arrays[name].tolist():
            assert 0 < count <= most and set(run_of_row[first : first + count]) == {run}
            expanded.update(range(first, first + count))
    assert expanded == Counter(row for row in range(60) if lists[run_of_row[row]])
    counts = work.arrays["lora_counts"].tolist()
    names = ("shrink_rows", "shrink_tiles", "expand_rows", "expand_tiles")
    assert counts == [len(work.arrays[name]) for name in names]


def test_no_two_entries_share_scratch() -> None:
    table, slots = resident()
    runs = Runs.build([3, 1, 2], [[(slots[3], 1.0), (slots[0], 1.0)], [], [(slots[2], 1.0)]])
    work = lora_work(runs, table, lone_rows=4, lone_ranks=2)
    assert work.arrays["lora_pitch"].tolist() == [48, 16, 32]
    assert work.arrays["lora_h_start"].tolist() == [0, 3 * 3 * 48, 3 * 3 * 64]
    assert work.h_elements == 3 * 3 * 64 + 2 * 3 * 32
    assert work.arrays["lora_first_row"].tolist() == [0, 0, 4]


def test_a_step_without_rows_or_adapters_has_no_work() -> None:
    table, _ = resident()
    for runs in (Runs.build([], []), Runs.build([4], [[]])):
        work = lora_work(runs, table, lone_rows=4, lone_ranks=2)
        assert work.arrays["lora_counts"].tolist() == [0, 0, 0, 0]
        assert not (work.any_rows or work.any_tiles or work.h_elements)
