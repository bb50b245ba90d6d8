"""The contract of ``loramux_kernels.sampling`` in torch, on any device: slow and plain."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux_kernels.mirror import mirror
from loramux_kernels.sampling import DrawParams, Float64, Int64, Logprobs

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
MASS_ONE = 1 << 40
"""The most likely id's mass in top_p's integer sums."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 [..., 4] of 32-bit words held in int64 (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps into the sign bit of int64; masking after the shift mends it.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        hi0, hi1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK32, hi0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack([word + torch.zeros_like(c0) for word in (c0, c1, c2, c3)], dim=-1)


def uniforms(key: NDArray[np.uint64], position: Int64, vocab_size: int) -> Tensor:
    """v float64 [R, V] in (0, 1)."""
    keys = torch.from_numpy(key.view(np.int64))[:, None]
    at = torch.from_numpy(position)[:, None]
    group = torch.arange((vocab_size + 3) // 4)[None, :]
    counter = (at & _MASK32, at >> 32, group, torch.zeros_like(group))
    h = philox(counter, (keys & _MASK32, (keys >> 32) & _MASK32))
    return (h.flatten(1)[:, :vocab_size].double() + 0.5) * 2.0**-32


def bad_rows(logits: Tensor) -> Tensor:
    """bool [R]: a NaN, a +inf, or nothing finite."""
    return ~logits.amax(dim=-1).isfinite()


def exponents(logits: Tensor, temperature: Tensor) -> Tensor:
    """x float64 [R, V]; ``temperature`` float64 [R], positive."""
    wide = logits.double()
    return (wide - wide.amax(dim=-1, keepdim=True)) / temperature[:, None]


def cut(logits: Tensor, params: DrawParams) -> tuple[Tensor, Tensor]:
    """The last kept entry of every row as (logit [R], id [R]), for temperatures above 0."""
    device, vocab_size = logits.device, logits.shape[1]
    there = mirror(
        {
            "temperature": params.temperature,
            "log_min_p": params.log_min_p,
            "top_k": params.top_k,
            "top_p": params.top_p,
        },
        device,
    )
    temperature, log_min_p, top_k, top_p = there.values()
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    x = exponents(logits, temperature).gather(1, order)
    top_k = torch.where(top_k > 0, top_k, vocab_size)
    keep = torch.arange(vocab_size, device=device) < top_k[:, None]
    keep &= x >= log_min_p[:, None]
    mass = torch.where(keep, x.exp() * MASS_ONE, 0.0).long().cumsum(dim=-1)
    enough = mass.double() >= (top_p * mass[:, -1].double())[:, None]
    by_mass = torch.where(top_p < 1, enough.int().argmax(dim=-1) + 1, vocab_size)
    # The clamp is for bad rows, whose NaN exponents keep nothing.
    last = torch.minimum(keep.sum(dim=-1), by_mass).clamp(min=1)[:, None] - 1
    last_id = order.gather(1, last)
    return logits.gather(1, last_id).squeeze(1), last_id.squeeze(1)


def draw(logits: Tensor, params: DrawParams, position: Int64) -> tuple[Int64, NDArray[np.bool_]]:
    """See ``loramux_kernels.sampling.draw``. On the CPU only."""
    bad = bad_rows(logits)
    ids = torch.arange(logits.shape[1])
    greedy = torch.from_numpy(params.temperature == 0)
    temperature = torch.from_numpy(params.temperature).masked_fill(greedy, 1.0)
    cut_logit, cut_id = cut(logits, params)
    keep = (logits > cut_logit[:, None]) | (
        (logits == cut_logit[:, None]) & (ids <= cut_id[:, None])
    )
    noise = -torch.log1p(-uniforms(params.key, position, logits.shape[1]))
    weight = exponents(logits, temperature).exp()
    score = torch.where(keep & (weight > 0), noise / weight, torch.inf)
    score[greedy] = -logits[greedy].double()
    token = (score == score.amin(dim=-1, keepdim=True)).int().argmax(dim=-1)
    return token.masked_fill(bad, -1).numpy(), bad.numpy()


def logprobs(logits: Tensor, ids: Int64, counts: Int64) -> Logprobs:
    """See ``loramux_kernels.sampling.logprobs``."""
    device, vocab_size = logits.device, logits.shape[1]
    width = int(counts.max(initial=0))
    good = ~bad_rows(logits)
    table = logits.double().log_softmax(dim=-1)
    at = torch.from_numpy(ids).to(device)[:, None]
    own = logits.gather(1, at)
    before = torch.arange(vocab_size, device=device) < at
    rank = 1 + ((logits > own) | ((logits == own) & before)).sum(dim=-1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :width]
    asked = (
        torch.arange(width, device=device)[:vocab_size]
        < torch.from_numpy(counts).to(device)[:, None]
    )
    asked &= good[:, None]
    beyond = (0, width - order.shape[1])
    top_ids = torch.where(asked, order, -1)
    top = torch.where(asked, table.gather(1, order), -torch.inf)
    return Logprobs(
        chosen=table.gather(1, at).squeeze(1).masked_fill(~good, torch.nan).cpu().numpy(),
        rank=rank.masked_fill(~good, 0).cpu().numpy(),
        top_ids=torch.nn.functional.pad(top_ids, beyond, value=-1).cpu().numpy(),
        top=torch.nn.functional.pad(top, beyond, value=-torch.inf).cpu().numpy(),
    )


def entropy_bits(logits: Tensor) -> Float64:
    """See ``loramux_kernels.sampling.entropy_bits``. Row by row: how a reduction over several sums
    may depend on how many there are."""
    bits = [_entropy_bits(row) for row in logits]
    return np.array([float(row) for row in bits], np.float64)


def _entropy_bits(logits: Tensor) -> Tensor:
    wide = logits.double()
    x = wide - wide.amax()
    weight = x.exp()
    total = weight.sum()
    # -inf is an id that adds nothing: 0 * -inf would be NaN.
    mean = torch.where(weight > 0, weight * x, 0.0).sum() / total
    bits = (total.log() - mean) / math.log(2)
    return torch.where(wide.amax().isfinite(), bits, torch.nan)
