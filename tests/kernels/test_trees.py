"""Attention over trees: a node has the bits of the last row of the chain of its ancestors."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np
import pytest
import torch
from tests.kernels.test_attention import Pool, no_rotation, random_qkv
from tests.trees import random_parents, way_to

from loramux_kernels import dispatch
from loramux_kernels.attention import Pages, Paths, compact, paged_attention, rope_store
from loramux_kernels.testing import assert_close, counting

torch.set_num_threads(1)

SHAPES = [(4, 2, 16), (3, 3, 8), (9, 3, 16), (5, 1, 80), (2, 1, 6)]


class Grove:
    """Some requests with so many tokens ``held``; each computes a tree, or where its parents are
    None a chain of ``chain`` rows, in one step."""

    def __init__(
        self,
        held: list[int],
        parents: list[list[int] | None],
        *,
        chain: int = 11,
        shape: tuple[int, int, int] = (4, 2, 16),
        page_tokens: int = 4,
        window: int = 0,
        backend: dispatch.Backend = "cpu",
    ) -> None:
        self.heads, kv_heads, dim = shape
        self.held, self.parents, self.backend, self.window = held, parents, backend, window
        self.rows = [chain if mine is None else len(mine) + 1 for mine in parents]
        self.context = [h + n for h, n in zip(held, self.rows, strict=True)]
        self.qkv = random_qkv(self.context, self.heads, kv_heads, dim)
        self.options = {"page_tokens": page_tokens, "kv_heads": kv_heads, "dim": dim}
        self.pool = Pool(self.context, **self.options)
        for request, count in enumerate(held):
            if count:
                self.run(self.pool, [request], [count], self.qkv[request][:count], None)

    def run(
        self,
        pool: Pool,
        requests: list[int],
        rows: list[int],
        qkv: torch.Tensor,
        paths: Paths | None,
        held: list[int] | None = None,
    ) -> tuple[torch.Tensor, Pages]:
        """Store and attend on layer 1; without rotation, so that rows can be fed in any place."""
        context = [h + n for h, n in zip(held or [0] * len(rows), rows, strict=True)]
        pages = dataclasses.replace(pool.pages(requests, rows, context), paths=paths)
        out = torch.full((len(qkv), self.heads * pool.dim), 7.0)
        cos, sin = no_rotation(8, pool.dim)
        common = {"arena": pool.arena, "pages": pages, "layer": 1, "num_heads": self.heads}
        with dispatch.using(self.backend):
            rope_store(
                qkv, cos=cos, sin=sin, positions=torch.zeros(len(qkv), dtype=torch.int64), **common
            )
            paged_attention(out, qkv, scale=0.3, window=self.window, **common)
        return out, pages

    def grow(self, parents: list[list[int] | None] | None = None) -> tuple[torch.Tensor, Pages]:
        """The step with all the trees."""
        paths = Paths.of(self.rows, self.parents if parents is None else parents)
        everyone = list(range(len(self.held)))
        rows = [qkv[held:] for qkv, held in zip(self.qkv, self.held, strict=True)]
        return self.run(self.pool, everyone, self.rows, torch.cat(rows), paths, self.held)

    def chained(self, request: int, way: list[int]) -> tuple[torch.Tensor, Pool, Pages]:
        """The same tokens, ``way`` alone behind what is held, in one chain from the start."""
        held = self.held[request]
        pool = Pool(self.context, **self.options, seed=1)
        rows = torch.cat((self.qkv[request][:held], self.qkv[request][held:][way]))
        out, pages = self.run(pool, [request], [len(rows)], rows, None)
        return out, pool, pages

    def check(self, out: torch.Tensor) -> None:
        """Every row of the step has the bits of its chain."""
        for request, part in enumerate(torch.split(out, self.rows)):
            mine = self.parents[request]
            if mine is None:
                whole, _, _ = self.chained(request, list(range(self.rows[request])))
                assert torch.equal(part, whole[self.held[request] :]), "a chain beside a tree"
                continue
            for node in range(len(part)):
                whole, _, _ = self.chained(request, way_to(mine, node))
                assert torch.equal(part[node], whole[-1]), (self.held[request], mine, node)


@pytest.mark.parametrize("window", [0, 1, 7, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_node_has_the_bits_of_its_chain(shape: tuple[int, int, int], window: int) -> None:
    rng = np.random.default_rng(0)
    for page_tokens in (1, 4, 5, 16):
        held = rng.integers(0, 71, 3).tolist()
        parents = [random_parents(rng, int(rng.integers(1, 20))), None, random_parents(rng, 9)]
        numba.set_num_threads(int(rng.integers(numba.config.NUMBA_NUM_THREADS)) + 1)
        grove = Grove(held, parents, shape=shape, page_tokens=page_tokens, window=window)
        out, _ = grove.grow()
        grove.check(out)


@pytest.mark.parametrize("held", range(71))
def test_wherever_pages_and_blocks_of_keys_begin(held: int) -> None:
    rng = np.random.default_rng(held)
    grove = Grove([held], [random_parents(rng, 7)], page_tokens=int(rng.integers(1, 9)))
    out, _ = grove.grow()
    grove.check(out)


def test_many_items_and_few_items_agree() -> None:
    """A batch so small that query heads are split over threads gives the same bits."""
    parents = [0, 0, 1, 1, 2, 5]
    together, _ = Grove([20] * 12, [parents] * 12).grow()
    alone, _ = Grove([20], [parents]).grow()
    assert torch.equal(alone, together[:7])


@pytest.mark.parametrize("window", [0, 5])
def test_the_reference_agrees(window: int) -> None:
    rng = np.random.default_rng(2)
    parents = [random_parents(rng, 12), None, random_parents(rng, 5)]
    outputs = [
        Grove([9, 30, 0], parents, window=window, backend=backend).grow()[0]
        for backend in ("cpu", "reference")
    ]
    assert_close(*outputs, rtol=0, atol=2e-6, because="fp32 sums of 40 terms in another order")


def test_a_wrong_ancestor_is_caught() -> None:
    """One node that sees a sibling instead of its parent: its bits and no other's change."""
    parents = [0, 0, 1, 1, 2]
    grove = Grove([18], [parents])
    wrong, _ = grove.grow([[0, 0, 1, 2, 2]])
    with pytest.raises(AssertionError, match=r"18, \[0, 0, 1, 1, 2\], 4"):
        grove.check(wrong)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_kept_lies_as_a_chain_and_nothing_else_moves(backend: dispatch.Backend) -> None:
    rng = np.random.default_rng(3)
    for page_tokens in (1, 3, 16):
        trees = [random_parents(rng, int(rng.integers(1, 14))) for _ in range(4)]
        held = rng.integers(0, 30, 4).tolist()
        grove = Grove([*held, 5], [*trees, None], page_tokens=page_tokens)
        _, pages = grove.grow()
        kept = {r: way_to(mine, int(rng.integers(len(mine) + 1))) for r, mine in enumerate(trees)}
        before = grove.pool.arena.clone()
        with dispatch.using(backend):
            compact(grove.pool.arena, pages=pages, kept=kept)
        allowed = torch.zeros(len(before), dtype=torch.bool)
        for request, way in kept.items():
            _, pool, chain = grove.chained(request, way)
            for token in range(held[request] + len(way)):
                mine = bytes_of(grove.pool, pages, request, token)
                expected = bytes_of(pool, chain, 0, token)
                assert torch.equal(grove.pool.arena[mine], pool.arena[expected]), (request, token)
                if token >= held[request]:
                    for layer in range(2):
                        allowed[bytes_of(grove.pool, pages, request, token, layer)] = True
        assert torch.equal(before[~allowed], grove.pool.arena[~allowed])


def bytes_of(pool: Pool, pages: Pages, request: int, token: int, layer: int = 1) -> torch.Tensor:
    """Where in the arena all that a token has in a layer lies."""
    size = pool.dim * 4
    page = int(pages.offsets[layer, request, token // pool.page_tokens])
    heads = torch.arange(2 * pool.kv_heads).unsqueeze(1) * pool.page_tokens * size
    return (page + token % pool.page_tokens * size + heads + torch.arange(size)).reshape(-1)


def test_what_is_in_place_costs_no_call() -> None:
    _, pages = (grove := Grove([5, 9], [[0, 0, 1], [0, 1, 0]])).grow()
    with counting() as calls:
        compact(grove.pool.arena, pages=pages, kept={0: [0, 1], 1: [0, 1, 2]})
        compact(grove.pool.arena, pages=pages, kept={})
        compact(grove.pool.arena, pages=pages, kept={0: [], 1: [0]})
    assert not calls
    with counting() as calls:
        compact(grove.pool.arena, pages=pages, kept={0: [0, 2], 1: [0, 3]})
    assert calls == {"cpu:compact": 1}


def test_checks() -> None:
    with pytest.raises(ValueError, match="1 is no parent for a tree's node 1"):
        Paths.of([2], [[1]])
    with pytest.raises(ValueError, match="-1 is no parent for a tree's node 2"):
        Paths.of([3], [[0, -1]])
    with pytest.raises(ValueError, match="a tree of 4 rows has 2 parents"):
        Paths.of([4], [[0, 1]])
    assert Paths.of([4, 1], [None, None]) is None
    pool = Pool([9])
    with pytest.raises(ValueError, match="2 rows, paths of 3"):
        dataclasses.replace(pool.pages([0], [2], [9]), paths=Paths.of([3], [[0, 0]]))
    pages = pool.pages([0], [3], [9])
    for kept in ([0, 2, 1], [0, 3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="not ascending rows of 3"):
            compact(pool.arena, pages=pages, kept={0: kept})
