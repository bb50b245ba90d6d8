"""RoPE, the KV store and paged attention against dense torch, over shuffled pages."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
import torch

from loramux_kernels import dispatch
from loramux_kernels.attention import Pages, paged_attention, rope_store
from loramux_kernels.testing import assert_close, assert_same, integer_tensor

torch.set_num_threads(1)

BECAUSE = "a score sums 80 fp32 products: up to 80 * 2^-24 * 2; weights move values of size 3 by it"


class Pool:
    """Shuffled pages for some requests in an arena full of NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        page_tokens: int = 4,
        kv_heads: int = 2,
        dim: int = 8,
        layers: int = 2,
        seed: int = 0,
    ) -> None:
        self.page_tokens, self.kv_heads, self.dim = page_tokens, kv_heads, dim
        size = 2 * kv_heads * page_tokens * dim * 4
        most = max([-(-n // page_tokens) for n in lengths], default=0)
        total = layers * len(lengths) * most + 3
        self.arena = torch.full((total * size,), 255, dtype=torch.uint8)
        order = np.random.default_rng(seed).permutation(total).astype(np.int64) * size
        self.offsets = order[3:].reshape(layers, len(lengths), most).copy()

    def pages(self, requests: list[int], rows: list[int], context: list[int]) -> Pages:
        return Pages(
            offsets=np.ascontiguousarray(self.offsets[:, requests]),
            row_start=np.array([0, *itertools.accumulate(rows)], dtype=np.int32),
            context=np.array(context, dtype=np.int32),
            page_tokens=self.page_tokens,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            dtype=torch.float32,
        )


def no_rotation(length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(length, dim // 2), torch.zeros(length, dim // 2)


def forward(
    pool: Pool,
    qkv: list[torch.Tensor],
    steps: list[dict[int, int]],
    *,
    heads: int,
    window: int = 0,
    layer: int = 1,
    backend: dispatch.Backend = "cpu",
) -> list[torch.Tensor]:
    """Run each step's ``{request: rows}`` and give every request's attention output."""
    outputs: list[list[torch.Tensor]] = [[] for _ in qkv]
    done = [0] * len(qkv)
    cos, sin = no_rotation(4096, pool.dim)
    for step in steps:
        requests, rows = list(step), list(step.values())
        chunks = [qkv[r][done[r] : done[r] + n] for r, n in step.items()]
        positions = [torch.arange(done[r], done[r] + n) for r, n in step.items()]
        for request, count in step.items():
            done[request] += count
        pages = pool.pages(requests, rows, [done[r] for r in requests])
        mine = torch.cat(chunks)
        out = torch.full((len(mine), heads * pool.dim), 7.0)
        with dispatch.using(backend):
            rope_store(
                mine,
                cos=cos,
                sin=sin,
                positions=torch.cat(positions),
                arena=pool.arena,
                pages=pages,
                layer=layer,
                num_heads=heads,
            )
            paged_attention(
                out,
                mine,
                arena=pool.arena,
                pages=pages,
                layer=layer,
                num_heads=heads,
                scale=0.3,
                window=window,
            )
        for request, part in zip(requests, torch.split(out, rows), strict=True):
            outputs[request].append(part)
    return [torch.cat(parts) for parts in outputs]


def dense(qkv: torch.Tensor, *, heads: int, kv_heads: int, dim: int, window: int) -> torch.Tensor:
    rows = len(qkv)
    split = qkv.double().view(rows, heads + 2 * kv_heads, dim).transpose(0, 1)
    q, k, v = split[:heads], split[heads : heads + kv_heads], split[heads + kv_heads :]
    k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
    query, key = torch.arange(rows).unsqueeze(1), torch.arange(rows)
    seen = (key <= query) & ((key > query - window) if window else True)
    scores = (0.3 * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, 2) @ v).transpose(0, 1).reshape(rows, -1)


def random_qkv(lengths: list[int], heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = (heads + 2 * kv_heads) * dim
    return [torch.randn(n, columns, generator=generator) for n in lengths]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 3, 64), (9, 3, 16), (5, 1, 80), (2, 1, 6)]
)
def test_equals_dense_attention(
    heads: int, kv_heads: int, dim: int, window: int, backend: dispatch.Backend
) -> None:
    lengths = [1, 37, 16, 4]
    qkv = random_qkv(lengths, heads, kv_heads, dim)
    pool = Pool(lengths, kv_heads=kv_heads, dim=dim)
    steps = [{0: 1, 1: 20}, {1: 16, 2: 15}, {3: 4, 2: 1, 1: 1}]
    outputs = forward(pool, qkv, steps, heads=heads, window=window, backend=backend)
    for out, mine in zip(outputs, qkv, strict=True):
        expected = dense(mine, heads=heads, kv_heads=kv_heads, dim=dim, window=window)
        assert_close(out.double(), expected, rtol=0, atol=3e-5, because=BECAUSE)


@pytest.mark.parametrize("window", [0, 7, 20])
def test_chunks_pages_and_neighbours_do_not_show(window: int) -> None:
    lengths = [41, 13, 22]
    heads, kv_heads, dim = 4, 2, 16
    qkv = random_qkv(lengths, heads, kv_heads, dim)

    def run(page_tokens: int, steps: list[dict[int, int]], seed: int) -> list[torch.Tensor]:
        pool = Pool(lengths, page_tokens=page_tokens, kv_heads=kv_heads, dim=dim, seed=seed)
        return forward(pool, qkv, steps, heads=heads, window=window)

    whole = run(16, [{0: 41}, {1: 13}, {2: 22}], seed=0)
    random = np.random.default_rng(0)
    for attempt in range(40):
        left = dict(enumerate(lengths))
        steps = []
        while any(left.values()):
            chosen = [
                r for r in random.permutation(3).tolist() if left[r] and random.random() < 0.7
            ]
            step = {r: int(min(left[r], random.choice([1, 1, 3, 8, 17]))) for r in chosen}
            for request, count in step.items():
                left[request] -= count
            if step:
                steps.append(step)
        numba.set_num_threads(int(random.integers(numba.config.NUMBA_NUM_THREADS)) + 1)
        again = run(int(random.choice([1, 4, 16, 5])), steps, seed=attempt)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_many_items_and_few_items_agree() -> None:
    """A batch so small that query heads are split over threads gives the same bits."""
    lengths = [33] * 12
    qkv = random_qkv(lengths, 6, 2, 16)
    together = forward(
        Pool(lengths, kv_heads=2, dim=16), qkv, [dict.fromkeys(range(12), 33)], heads=6
    )
    alone = forward(
        Pool(lengths, kv_heads=2, dim=16), qkv, [{11: 33}] + [{r: 33} for r in range(11)], heads=6
    )
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_store_is_exact_and_touches_nothing_else(backend: dispatch.Backend) -> None:
    heads, kv_heads, dim = 2, 2, 8
    pool = Pool([9, 3], kv_heads=kv_heads, dim=dim)
    pool.arena.zero_()
    pages = pool.pages([0, 1], [2, 3], [9, 3])
    generator = torch.Generator().manual_seed(1)
    qkv = integer_tensor(7, (heads + 2 * kv_heads) * dim, generator=generator, low=1, high=9)
    before = qkv.clone()
    cos, sin = no_rotation(16, dim)
    with dispatch.using(backend):
        rope_store(
            qkv,
            cos=cos,
            sin=sin,
            positions=torch.tensor([7, 8, 0, 1, 2]),
            arena=pool.arena,
            pages=pages,
            layer=0,
            num_heads=heads,
        )
    assert_same(qkv, before)
    floats = pool.arena.view(torch.float32)
    expected = torch.zeros_like(floats)
    for row, (request, token) in enumerate([(0, 7), (0, 8), (1, 0), (1, 1), (1, 2)]):
        for side in range(2):
            for head in range(kv_heads):
                start = int(pool.offsets[0, request, token // 4]) // 4
                start += ((side * kv_heads + head) * 4 + token % 4) * dim
                column = (heads + side * kv_heads + head) * dim
                expected[start : start + dim] = before[row, column : column + dim]
    assert_same(floats, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dim", [8, 64, 6])
def test_rope_is_the_half_split_rotation(dim: int, backend: dispatch.Backend) -> None:
    heads, kv_heads = 3, 1
    pool = Pool([30], kv_heads=kv_heads, dim=dim)
    pages = pool.pages([0], [5], [30])
    angles = torch.outer(
        torch.arange(40.0), 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    )
    positions = torch.tensor([25, 26, 27, 28, 29])
    qkv = random_qkv([6], heads, kv_heads, dim)[0]
    before = qkv.clone()
    with dispatch.using(backend):
        rope_store(
            qkv,
            cos=angles.cos(),
            sin=angles.sin(),
            positions=positions,
            arena=pool.arena,
            pages=pages,
            layer=0,
            num_heads=heads,
        )
    turned = before[:5].double().view(5, -1, dim)[:, : heads + kv_heads]
    half = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=2)
    wave = torch.cat((angles, angles), dim=1)[positions].unsqueeze(1)
    expected = turned * wave.cos().double() + half * wave.sin().double()
    got = qkv[:5].view(5, -1, dim)[:, : heads + kv_heads].double()
    assert_close(got, expected, rtol=0, atol=2e-6, because="two fp32 products and their sum")
    assert_same(qkv[5], before[5])
    assert_same(qkv[:, -kv_heads * dim :], before[:, -kv_heads * dim :])


def test_padding_rows_stay() -> None:
    pool = Pool([3])
    pages = pool.pages([0], [3], [3])
    pool.arena.zero_()
    out = torch.full((5, 32), 7.0)
    paged_attention(
        out,
        torch.ones(5, 64),
        arena=pool.arena,
        pages=pages,
        layer=0,
        num_heads=4,
        scale=1.0,
        window=0,
    )
    assert (out[:3] == 0).all() and (out[3:] == 7).all()


def test_nan_stays_in_its_request() -> None:
    qkv = random_qkv([20, 20], 4, 2, 8)
    qkv[0][3] = float("nan")
    outputs = forward(Pool([20, 20]), qkv, [{0: 20, 1: 20}], heads=4)
    assert torch.isfinite(outputs[1]).all()
    assert torch.isfinite(outputs[0][:3]).all() and torch.isnan(outputs[0][3:]).all()


def test_large_scores_do_not_overflow() -> None:
    qkv = random_qkv([40], 4, 2, 8)
    qkv[0][:, :32] *= 1e3
    out = forward(Pool([40]), qkv, [{0: 40}], heads=4)[0]
    expected = dense(qkv[0], heads=4, kv_heads=2, dim=8, window=0)
    # Scores of magnitude 5000 carry an fp32 error of about 5e-4, and so do the weights.
    assert_close(out.double(), expected, rtol=0, atol=5e-3, because="rounding of large scores")


def test_pages_checks() -> None:
    pool = Pool([9])
    with pytest.raises(ValueError, match="a context of 13 tokens does not fit 3 pages of 4"):
        pool.pages([0], [1], [13])
    with pytest.raises(ValueError, match="more rows than context"):
        pool.pages([0], [4], [3])
    with pytest.raises(ValueError, match="window must not be negative"):
        paged_attention(
            torch.zeros(1, 32),
            torch.zeros(1, 64),
            arena=pool.arena,
            pages=pool.pages([0], [1], [1]),
            layer=0,
            num_heads=4,
            scale=1.0,
            window=-1,
        )
