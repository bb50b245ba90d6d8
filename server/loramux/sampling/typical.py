"""Typical acceptance (Medusa, arXiv 2401.10774): a guess passes that is likely, drawn or not.

A token x passes where p(x) > min(EPSILON, DELTA * exp(-H(p))): the more a model hesitates, the
less it takes. This changes what is delivered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loramux_kernels.sampling import DrawParams, reference

EPSILON, DELTA = 0.09, 0.3
"""The published ones."""


def typical(logits: Tensor, draw: DrawParams, guesses: Sequence[tuple[int, int]]) -> Tensor:
    """bool [G]: whether the token of each (row, token) passes, for the distribution that the row of
    ``logits`` float32 [R, V] is drawn from, after temperature (above 0) and filters. Nothing passes
    in a row that is not finite."""
    rows, which = np.unique([row for row, _ in guesses], return_inverse=True)
    device = logits.device
    chosen = logits[torch.from_numpy(rows).to(device)]
    there = DrawParams(
        draw.temperature[rows],
        draw.log_min_p[rows],
        draw.top_k[rows],
        draw.top_p[rows],
        draw.key[rows],
    )
    logit, last = (of[:, None] for of in reference.cut(chosen, there))
    ids = torch.arange(chosen.shape[1], device=device)
    keep = (chosen > logit) | ((chosen == logit) & (ids <= last))
    temperature = torch.from_numpy(there.temperature).to(device)
    p = reference.exponents(chosen, temperature).masked_fill(~keep, -torch.inf).softmax(dim=-1)
    least = (DELTA * (-torch.special.entr(p).sum(dim=-1)).exp()).clamp(max=EPSILON)
    at = torch.from_numpy(which).to(device)
    tokens = torch.tensor([token for _, token in guesses], device=device)
    passes: Tensor = p[at, tokens] > least[at]
    return passes
