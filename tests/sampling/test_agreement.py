"""The chance that two distributions draw the same token: closed form, draws, and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loramux.sampling.agreement import acceptance, agreement
from loramux_kernels.sampling import DrawParams, draw, stream_key

DRAWS = 20_000


def simplex(rng: np.random.Generator, size: int, rows: int, evenness: float) -> Tensor:
    return torch.from_numpy(rng.dirichlet(np.full(size, evenness), rows))


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """p and q float64 [V]: near and far, with ids that only one of them has, equal, disjoint."""
    rng = np.random.default_rng(0)
    p, q = simplex(rng, 8, 2, 1.0)
    wide, other = simplex(rng, 129, 2, 0.3)
    cut, bare = p.clone(), q.clone()
    cut[:3], bare[2:5] = 0.0, 0.0
    return {
        "far": (p, q),
        "near": (p, 0.9 * p + 0.1 * q),
        "wide": (wide, other),
        "filtered": (cut / cut.sum(), bare / bare.sum()),
        "equal": (wide, wide),
        "disjoint": (torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 0, 1]).double()),
        "sure": (torch.tensor([0.25, 0.5, 0.25]).double(), torch.tensor([0.0, 1.0, 0.0]).double()),
        "one": (torch.ones(1).double(), torch.ones(1).double()),
    }


PAIRS = pairs()


def tokens(p: Tensor) -> Tensor:
    """What p draws at so many positions."""
    how = DrawParams(
        temperature=np.ones(DRAWS),
        log_min_p=np.full(DRAWS, -math.inf),
        top_k=np.zeros(DRAWS, np.int64),
        top_p=np.ones(DRAWS),
        key=np.full(DRAWS, stream_key(11, 0), np.uint64),
    )
    logits = p.log().float().repeat(DRAWS, 1)
    return torch.from_numpy(draw(logits, how, np.arange(DRAWS, dtype=np.int64))[0])


def far_off(share: float, chance: float, draws: int) -> float:
    """In standard deviations."""
    return abs(share - chance) / math.sqrt(max(chance * (1 - chance) / draws, 1e-12))


@pytest.mark.parametrize("name", PAIRS)
def test_draws_with_the_same_noise_agree_as_often_as_it_says(name: str) -> None:
    p, q = PAIRS[name]
    of_p, of_q = tokens(p), tokens(q)
    same = of_p == of_q
    chance = agreement(p, q).item()
    assert far_off(same.double().mean().item(), chance, DRAWS) < 4
    for token, times in enumerate(of_q.bincount(minlength=len(q)).tolist()):
        if times >= 50:
            one = acceptance(p, q, torch.tensor(token)).item()
            assert far_off(same[of_q == token].double().mean().item(), one, times) < 4.5


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_mean_over_the_drafts_tokens(name: str) -> None:
    p, q = PAIRS[name]
    there = q.nonzero()[:, 0]
    each = acceptance(p.expand(len(there), -1), q.expand(len(there), -1), there)
    assert agreement(p, q).item() == pytest.approx((q[there] * each).sum().item(), abs=1e-12)


def test_every_row_of_a_batch_stands_for_itself() -> None:
    rng = np.random.default_rng(1)
    p, q = simplex(rng, 37, 10, 0.2), simplex(rng, 37, 10, 0.2)
    token = q.argmax(-1)
    alone = [agreement(p[row], q[row]).item() for row in range(10)]
    assert agreement(p.view(2, 5, 37), q.view(2, 5, 37)).flatten().tolist() == alone
    kept = [acceptance(p[row], q[row], token[row]).item() for row in range(10)]
    assert acceptance(p.view(2, 5, 37), q.view(2, 5, 37), token.view(2, 5)).flatten().tolist() == (
        kept
    )


@pytest.mark.parametrize("evenness", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("size", [2, 8, 300])
def test_it_lies_between_the_bounds(size: int, evenness: float) -> None:
    rng = np.random.default_rng(size)
    p, q = simplex(rng, size, 50, evenness), simplex(rng, size, 50, evenness)
    overlap = torch.minimum(p, q).sum(-1)
    chance = agreement(p, q)
    assert (chance <= overlap + 1e-12).all()
    assert (chance >= overlap / (2 - overlap) - 1e-12).all()
    assert torch.allclose(chance, agreement(q, p), atol=1e-12)


def test_a_sure_draft_is_kept_as_often_as_the_target_draws_it() -> None:
    """As from lookup: the residual rule accepts no more of these."""
    p, q = PAIRS["sure"]
    assert agreement(p, q).item() == acceptance(p, q, torch.tensor(1)).item() == 0.5
    assert agreement(*PAIRS["disjoint"]).item() == 0.0
    assert agreement(*PAIRS["equal"]).item() == pytest.approx(1.0, abs=1e-12)
