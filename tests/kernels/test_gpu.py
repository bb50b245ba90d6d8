"""The Triton kernels against the torch references: on a GPU, or tiny under the interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch
from tests.kernels import test_modulate
from tests.trees import way_to

from loramux_kernels import dispatch, norm
from loramux_kernels.attention import Pages, Paths, compact, paged_attention, rope_store
from loramux_kernels.attention import pages as layout
from loramux_kernels.lora import MODULES, SITES, Runs, add_lora
from loramux_kernels.lora.work import lora_work
from loramux_kernels.mirror import mirror
from loramux_kernels.testing import (
    assert_close,
    assert_same,
    counting,
    integer_tensor,
    make_resident,
    random_weights,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU"),
]

WIDTHS = {name: (24, 24) for name in MODULES}
WIDTHS |= {"k_proj": (24, 8), "v_proj": (24, 8), "down_proj": (40, 24)}
WIDTHS |= {"gate_proj": (24, 40), "up_proj": (24, 40)}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounding(dtype: torch.dtype) -> float:
    """Relative size of one narrowing: the interpreter cuts to bfloat16, hardware rounds."""
    return torch.finfo(dtype).eps * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resident(slice_bytes: int = 256):  # type: ignore[no-untyped-def]
    rng = generator(7)
    ranks = [
        (torch.bfloat16, lambda layer, module: (1, 3, 5, 0, 2, 4, 7)[module]),
        (torch.float16, lambda layer, module: module % 3 * 4),
        (torch.float32, lambda layer, module: 17),
    ]
    weights = [
        random_weights(WIDTHS, rank, num_layers=2, dtype=dtype, generator=rng)
        for dtype, rank in ranks
    ]
    # and with middles; their widths are padded, and one is more than a chunk and a tile
    weights += [
        random_weights(WIDTHS, rank, num_layers=2, dtype=dtype, generator=rng, middles=True)
        for dtype, rank in ranks
    ]
    return make_resident(
        weights, WIDTHS, num_layers=2, slice_bytes=slice_bytes, chunk=16, device=DEVICE
    )


BATCHES = [
    ([1], [[(2, 2.0)]]),
    ([2, 0, 1, 3], [[(0, 1.0)], [(1, 1.0)], [], [(2, 0.5), (0, 1.0), (1, -1.0)]]),
    ([19, 1, 1], [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)]]),
    ([2, 1, 18, 1], [[(5, 1.0), (0, 1.0)], [(3, 2.0)], [(2, 1.0), (4, -0.5)], [(2, 1.0)]]),
]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("batch", range(len(BATCHES)))
def test_lora_equals_the_reference_exactly(batch: int, site: str) -> None:
    arena, table, slots = resident()
    rows, lists = BATCHES[batch]
    runs = Runs.build(rows, [[(slots[i], c) for i, c in entries] for entries in lists])
    in_width, out_width = table.site_widths[site]
    x = integer_tensor(sum(rows) + 2, in_width, generator=generator(1), high=2, low=-2).to(DEVICE)
    y = integer_tensor(sum(rows) + 2, out_width, generator=generator(2)).to(DEVICE)
    expected = y.clone()
    args = {"arena": arena, "table": table, "runs": runs, "layer": 1, "site": site}
    with dispatch.using("reference"):
        add_lora(expected, x, **args)
    with dispatch.using("gpu"), counting() as calls:
        add_lora(y, x, **args)
    assert_same(y, expected)
    assert set(calls.values()) == {1}
    assert any("middle" in name for name in calls) == (batch == 3)


@pytest.mark.parametrize("slice_bytes", [64, 320])
def test_gains_and_shifts_are_exact(slice_bytes: int) -> None:
    test_modulate.check("gpu", slice_bytes, DEVICE)


def test_a_lone_row_keeps_its_bits_whoever_wears_its_adapter() -> None:
    """Decodes and a prompt's chunk side by side in one run: each row as it would be alone."""
    arena, table, slots = resident()
    x = torch.randn(6, 24, generator=generator(1)).to(DEVICE)
    y = torch.randn(6, 40, generator=generator(2)).to(DEVICE)
    args = {"arena": arena, "table": table, "layer": 1, "site": "qkv"}
    alone = np.array([True, True, False, False, False, True])

    def run(rows: slice, alone: np.ndarray) -> torch.Tensor:
        adapters = [(slots[0], 2.0), (slots[5], 0.5)]
        runs = Runs.build([rows.stop - rows.start], [adapters])
        work = lora_work(runs, table, lone_rows=4, lone_ranks=2, alone=alone)
        runs.bind(work, mirror(work.arrays, torch.device(DEVICE)))
        mine = y[rows].clone()
        with dispatch.using("gpu"):
            add_lora(mine, x[rows].contiguous(), runs=runs, **args)
        return mine

    together = run(slice(0, 6), alone)
    for row in (0, 1, 5):
        assert_same(together[row : row + 1], run(slice(row, row + 1), np.array([True])))
    assert_same(together[2:5], run(slice(2, 5), np.zeros(3, np.bool_)))


def test_lora_in_bfloat16() -> None:
    """Whole numbers below 256 are exact in bfloat16, so two inputs a row and scale 1."""
    arena, table, slots = resident(slice_bytes=64)
    runs = Runs.build([1, 2], [[(slots[0], 2.0)], [(slots[0], 2.0), (slots[1], 2.0)]])
    x = torch.zeros(3, 24, dtype=torch.bfloat16, device=DEVICE)
    x[:, 5], x[:, 23] = 1, -1
    y = torch.zeros(3, 40, dtype=torch.bfloat16, device=DEVICE)
    expected = y.clone()
    args = {"arena": arena, "table": table, "runs": runs, "layer": 0, "site": "qkv"}
    with dispatch.using("reference"):
        add_lora(expected, x, **args)
    with dispatch.using("gpu"):
        add_lora(y, x, **args)
    assert_same(y, expected)
    assert y.count_nonzero() > 60


class Paged:
    """Requests with a random history, as pages over an arena full of NaN."""

    def __init__(
        self,
        history: list[int],
        rows: list[int],
        *,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        dim: int,
        page_tokens: int = 4,
    ) -> None:
        context = [h + r for h, r in zip(history, rows, strict=True)]
        size = 2 * kv_heads * page_tokens * dim * dtype.itemsize
        most = max(-(-n // page_tokens) for n in context)
        order = np.random.default_rng(0).permutation(2 * len(rows) * most).astype(np.int64)
        self.pages = Pages(
            offsets=(order * size).reshape(2, len(rows), most),
            row_start=np.array([0, *itertools.accumulate(rows)], dtype=np.int32),
            context=np.array(context, dtype=np.int32),
            page_tokens=page_tokens,
            num_kv_heads=kv_heads,
            head_dim=dim,
            dtype=dtype,
        )
        self.heads = heads
        arena = torch.full((len(order) * size,), 255, dtype=torch.uint8)
        rng = generator(3)
        for request, length in enumerate(history):
            for token in range(length):
                start = int(self.pages.offsets[1, request, token // page_tokens])
                slot = arena[start : start + size].view(dtype)
                slot = slot.view(2, kv_heads, page_tokens, dim)
                slot[:, :, token % page_tokens] = torch.randn(2, kv_heads, dim, generator=rng).to(
                    dtype
                )
        self.arena = arena.to(DEVICE)
        columns = (heads + 2 * kv_heads) * dim
        self.qkv = torch.randn(sum(rows) + 1, columns, generator=rng).to(DEVICE, dtype)
        starts = zip(history, context, strict=True)
        self.positions = torch.tensor([p for a, b in starts for p in range(a, b)], device=DEVICE)
        angles = torch.outer(torch.arange(float(max(context))), torch.rand(dim // 2, generator=rng))
        self.cos, self.sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)

    def renew(self) -> None:
        """Forget what was brought to the device."""
        self.pages = dataclasses.replace(self.pages)

    def run(self, backend: dispatch.Backend, window: int) -> tuple[torch.Tensor, ...]:
        arena, qkv = self.arena.clone(), self.qkv.clone()
        out = torch.full(
            (len(qkv), self.heads * self.pages.head_dim), 7.0, dtype=qkv.dtype, device=DEVICE
        )
        common = {"arena": arena, "pages": self.pages, "layer": 1, "num_heads": self.heads}
        with dispatch.using(backend):
            rope_store(qkv, cos=self.cos, sin=self.sin, positions=self.positions, **common)
            paged_attention(out, qkv, scale=0.3, window=window, **common)
        return out, qkv, arena


CASES = [
    ([0], [1], 2, 1, 8),
    ([5, 0, 40], [1, 1, 1], 4, 2, 16),
    ([3, 37], [9, 2], 6, 2, 8),
    ([0, 6], [11, 1], 7, 1, 20),
]


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_agrees_with_the_reference(dtype: torch.dtype, case: int, window: int) -> None:
    history, rows, heads, kv_heads, dim = CASES[case]
    paged = Paged(history, rows, dtype=dtype, heads=heads, kv_heads=kv_heads, dim=dim)
    out, qkv, arena = paged.run("gpu", window)
    expected_out, expected_qkv, expected_arena = paged.run("reference", window)
    eps = rounding(dtype)
    because = "one rounding to the dtype of sums that differ in the last fp32 bits"
    assert_close(qkv, expected_qkv, rtol=2 * eps, atol=eps, because=because)
    assert_close(
        arena.view(dtype).nan_to_num(9),
        expected_arena.view(dtype).nan_to_num(9),
        rtol=2 * eps,
        atol=eps,
        because=because,
    )
    slack = max(4 * eps, 1e-5)
    assert_close(
        out, expected_out, rtol=slack, atol=slack, because=because + ", k and v each within one"
    )


def test_splits_show_in_no_row() -> None:
    """A long neighbour makes every row go through parts; the short row's bits stay."""
    paged = Paged([30, 70], [1, 1], dtype=torch.float32, heads=2, kv_heads=1, dim=8)
    before = layout.SPLIT
    try:
        whole, _, _ = paged.run("gpu", 0)
        layout.SPLIT = 32
        paged.renew()
        with counting() as calls:
            parts, _, _ = paged.run("gpu", 0)
        windowed, _, _ = paged.run("gpu", 5)
    finally:
        layout.SPLIT = before
    assert calls["gpu:fold_attention"] == 1
    assert_same(parts[0], whole[0])
    expected, _, _ = paged.run("reference", 0)
    because = "fp32 sums in another order"
    assert_close(parts, expected, rtol=1e-5, atol=1e-5, because=because)
    expected, _, _ = paged.run("reference", 5)
    assert_close(windowed, expected, rtol=1e-5, atol=1e-5, because=because)


TREE = [0, 0, 1, 1, 2, 5]


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 6), (torch.bfloat16, 0)])
def test_trees_agree_with_the_reference(dtype: torch.dtype, window: int) -> None:
    """Two trees and a chain between them."""
    paged = Paged([5, 20, 13], [7, 9, 3], dtype=dtype, heads=4, kv_heads=2, dim=8)
    paths = Paths.of([7, 9, 3], [TREE, None, [0, 0]])
    paged.pages = dataclasses.replace(paged.pages, paths=paths)
    out, _, arena = paged.run("gpu", window)
    expected_out, _, expected_arena = paged.run("reference", window)
    eps = rounding(dtype)
    because = "one rounding to the dtype of sums that differ in the last fp32 bits"
    assert_close(
        arena.view(dtype).nan_to_num(9),
        expected_arena.view(dtype).nan_to_num(9),
        rtol=2 * eps,
        atol=eps,
        because=because,
    )
    slack = max(4 * eps, 1e-5)
    assert_close(out, expected_out, rtol=slack, atol=slack, because=because)


@pytest.mark.parametrize(("split", "window"), [(512, 0), (32, 0), (32, 3)])
def test_a_node_of_a_tree_has_the_bits_of_its_chain(
    split: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a chain, and with the last split of the context in the middle of the tree: there its
    last node, of depth 3, and what the window leaves it stand on both sides."""
    monkeypatch.setattr(layout, "SPLIT", split)

    def grown(history: list[int], rows: list[int]) -> Paged:
        paged = Paged(history, rows, dtype=torch.float32, heads=4, kv_heads=2, dim=16)
        paged.cos, paged.sin = torch.ones_like(paged.cos), torch.zeros_like(paged.sin)
        return paged

    paged = grown([30, 9], [7, 3])
    paths = Paths.of([7, 3], [TREE, None])
    paged.pages = dataclasses.replace(paged.pages, paths=paths)
    out, _, _ = paged.run("gpu", window)
    for node in (3, 6):
        way = way_to(TREE, node)
        chain = grown([30], [len(way)])
        chain.qkv = paged.qkv[[*way, 0]]
        expected, _, _ = chain.run("gpu", window)
        assert_same(out[node], expected[len(way) - 1])


@pytest.mark.parametrize("shared_table", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_of_a_tree_is_copied_in_order(dtype: torch.dtype, shared_table: bool) -> None:
    """A place that one token leaves is taken by the next; each layer has a table of its own, or one
    table stands for all."""
    paged = Paged([5, 40, 13], [7, 9, 4], dtype=dtype, heads=4, kv_heads=2, dim=10)
    pages = paged.pages
    arena = torch.randint(256, (2 * len(paged.arena),), dtype=torch.uint8, generator=generator())
    one = pages.offsets[:1]
    if shared_table:
        start = np.array([0, len(paged.arena)])
        pages = dataclasses.replace(pages, offsets=np.concatenate((one, one + start[1])))
    expected, got = arena.clone(), arena.clone().to(DEVICE)
    kept = {0: [0, 2, 3, 4, 6], 1: [0, 1, 2], 2: [0, 3]}
    with dispatch.using("reference"):
        compact(expected, pages=pages, kept=kept)
    if shared_table:
        pages = dataclasses.replace(pages, offsets=one, layer_start=start)
    with dispatch.using("gpu"):
        compact(got, pages=pages, kept=kept)
    assert_same(got.cpu(), expected)
    changed = (expected != arena).sum()
    size = 5 * 2 * 2 * 2 * 10 * dtype.itemsize  # moves, layers, k and v, heads
    assert 0.9 * size < changed <= size


def test_blocks_of_keys_start_at_absolute_offsets() -> None:
    """The last two rows of a chunk give the same bits without the seven before them."""
    whole = Paged([37], [9], dtype=torch.float32, heads=4, kv_heads=2, dim=16)
    last = Paged([44], [2], dtype=torch.float32, heads=4, kv_heads=2, dim=16)
    _, _, whole.arena = whole.run("reference", 0)
    last.arena, last.qkv = whole.arena, whole.qkv[7:].clone()
    last.cos, last.sin = whole.cos, whole.sin
    for window in (0, 20, 40):
        expected, _, _ = whole.run("gpu", window)
        out, _, _ = last.run("gpu", window)
        assert_same(out[:2], expected[7:9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 33])
def test_norms_agree_with_the_reference(width: int, dtype: torch.dtype) -> None:
    eps = rounding(dtype)
    x = torch.randn(3, width, generator=generator()).to(DEVICE, dtype)
    residual = torch.randn(3, width, generator=generator(1)).to(DEVICE, dtype)
    weight = torch.randn(width, generator=generator(2)).to(DEVICE, dtype)
    gate_up = 4 * torch.randn(3, 2 * width, generator=generator(3)).to(DEVICE, dtype)
    results = []
    for backend in ("gpu", "reference"):
        outs = [torch.zeros_like(x) for _ in range(3)]
        total = residual.clone()
        with dispatch.using(backend):
            norm.rms_norm(outs[0], x, weight, 1e-5)
            norm.add_rms_norm(outs[1], total, x, weight, 1e-5)
            norm.silu_mul(outs[2], gate_up)
        results.append(torch.cat((*outs, total)))
    because = "one rounding before the weight and one after, of fp32 values a few ulp apart"
    assert_close(results[0], results[1], rtol=4 * eps, atol=1e-6, because=because)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norm_agrees_with_the_reference(dtype: torch.dtype) -> None:
    eps = rounding(dtype)
    qkv = torch.randn(3, 7 * 12, generator=generator()).to(DEVICE, dtype)
    weights = torch.randn(2, 12, generator=generator(1)).to(DEVICE, dtype)
    results = []
    for backend in ("gpu", "reference"):
        mine = qkv.clone()
        with dispatch.using(backend):
            norm.head_rms_norm(
                mine, weights[0], weights[1], num_heads=3, num_kv_heads=2, head_dim=12, eps=1e-5
            )
        results.append(mine)
    because = "one rounding before the weight and one after"
    assert_close(results[0], results[1], rtol=4 * eps, atol=1e-6, because=because)
    assert_same(results[0][:, 60:], qkv[:, 60:])
