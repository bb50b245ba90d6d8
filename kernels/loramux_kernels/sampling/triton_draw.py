"""``loramux_kernels.sampling.draw`` on a GPU: a program per (row, block of ids), then per row.

A program hashes ``BLOCK`` ids, four to a counter, and keeps its least ``E / w``; the second kernel
takes the least over the blocks, the lowest id on ties. Filters come in as the last kept (logit, id)
of each row, found by the sort of ``reference.cut`` for the rows that have one. What rows draw with
comes over in one copy, the tokens go back in one, and only the wait for those is a wait.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_kernels.mirror import mirror
from loramux_kernels.sampling import Drawn, DrawParams, Int64
from loramux_kernels.sampling.reference import cut

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def race_kernel(  # type: ignore[no-untyped-def]
    logits,
    peak,
    temperature,
    cut_logit,
    cut_id,
    key,
    position,
    best_score,
    best_id,
    stride,
    vocab_size,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """best_score, best_id [R, blocks]: the least E / w of each block of logits [R, V]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    top = tl.load(peak + row)
    t = tl.load(temperature + row)
    k = tl.load(key + row).to(tl.uint64, bitcast=True)
    at = tl.load(position + row).to(tl.uint64, bitcast=True)

    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low, high = (at & 0xFFFFFFFF).to(tl.uint32), (at >> 32).to(tl.uint32)
    k0, k1 = (k & 0xFFFFFFFF).to(tl.uint32), (k >> 32).to(tl.uint32)
    h0, h1, h2, h3 = tl.philox_impl(
        zero + low, zero + high, group.to(tl.uint32), zero, zero + k0, zero + k1
    )
    h = tl.reshape(tl.join(tl.join(h0, h2), tl.join(h1, h3)), [BLOCK])

    token = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf"))
    keep = token < vocab_size
    if FILTERED:
        last_logit = tl.load(cut_logit + row)
        last_id = tl.load(cut_id + row)
        keep = (logit > last_logit) | ((logit == last_logit) & (token <= last_id))
    # Triton has no log1p; v has 33 bits, so 1 - v is exact and its logarithm the same number.
    noise = -tl.log(1.0 - (h.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    distance = logit.to(tl.float64) - top.to(tl.float64)
    if t > 0:
        weight = tl.exp(distance / t)
        drawn = keep & (weight > 0)
        score = tl.where(drawn, noise / tl.where(drawn, weight, 1.0), float("inf"))
    else:
        score = -distance
    score = tl.where(token < vocab_size, score, float("inf"))
    least = tl.min(score, axis=0)
    first = tl.min(tl.where(score == least, token, vocab_size), axis=0)
    out = row * tl.num_programs(1) + block
    tl.store(best_score + out, least)
    tl.store(best_id + out, first)


@triton.jit  # type: ignore[untyped-decorator]
def finish_kernel(  # type: ignore[no-untyped-def]
    best_score, best_id, peak, token, blocks, vocab_size, WIDTH: tl.constexpr
):
    """token [R]: the id of the least score over the blocks, -1 where the peak is not finite."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, WIDTH)
    inside = block < blocks
    score = tl.load(best_score + row * blocks + block, mask=inside, other=float("inf"))
    ids = tl.load(best_id + row * blocks + block, mask=inside, other=vocab_size)
    least = tl.min(score, axis=0)
    first = tl.min(tl.where(score == least, ids, vocab_size), axis=0)
    finite = tl.abs(tl.load(peak + row)) < float("inf")
    tl.store(token + row, tl.where(finite, first, -1))


def _cuts(
    logits: Tensor, params: DrawParams, filtered: Int64, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The last kept (logit [R], id [R]); rows that are not ``filtered`` keep everything, unsorted.
    ``index`` is ``filtered`` on the device."""
    rows, vocab_size = logits.shape
    cut_logit = torch.full((rows,), -torch.inf, device=logits.device)
    cut_id = torch.full((rows,), vocab_size, dtype=torch.int64, device=logits.device)
    chosen = DrawParams(
        temperature=params.temperature[filtered],
        log_min_p=params.log_min_p[filtered],
        top_k=params.top_k[filtered],
        top_p=params.top_p[filtered],
        key=params.key[filtered],
    )
    cut_logit[index], cut_id[index] = cut(logits[index], chosen)
    return cut_logit, cut_id


def start_draw(logits: Tensor, params: DrawParams, position: Int64) -> Callable[[], Drawn]:
    """See ``loramux_kernels.sampling.start_draw``. Rows of ``logits`` are contiguous."""
    rows, vocab_size = logits.shape
    device = logits.device
    limited = (params.log_min_p > -np.inf) | (params.top_k > 0) | (params.top_p < 1)
    filtered = np.flatnonzero(limited & (params.temperature > 0))
    arrays = {
        "temperature": params.temperature,
        "key": params.key.view(np.int64),
        "position": position,
        "filtered": filtered,
    }
    there = mirror(arrays, device)
    peak = logits.amax(dim=-1)  # NaN if the row holds one
    cut_logit, cut_id = peak, there["position"]
    if len(filtered):
        cut_logit, cut_id = _cuts(logits, params, filtered, there["filtered"])
    blocks = triton.cdiv(vocab_size, BLOCK)
    best_score = torch.empty((rows, blocks), dtype=torch.float64, device=device)
    best_id = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    race_kernel[(rows, blocks)](
        logits,
        peak,
        there["temperature"],
        cut_logit,
        cut_id,
        there["key"],
        there["position"],
        best_score,
        best_id,
        logits.stride(0),
        vocab_size,
        FILTERED=len(filtered) > 0,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    finish_kernel[(rows,)](
        best_score,
        best_id,
        peak,
        token,
        blocks,
        vocab_size,
        WIDTH=triton.next_power_of_2(blocks),
        enable_fp_fusion=False,
    )
    return _fetched(token)


def draw(logits: Tensor, params: DrawParams, position: Int64) -> Drawn:
    """See ``loramux_kernels.sampling.draw``."""
    return start_draw(logits, params, position)()


def _fetched(token: Tensor) -> Callable[[], Drawn]:
    """``token`` on its way to the host; who wants it waits for it alone, and not for what is queued
    behind it."""
    if not token.is_cuda:
        tokens = token.numpy()
        return lambda: (tokens, tokens < 0)
    there = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
    there.copy_(token, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def result() -> Drawn:
        copied.synchronize()
        # Pinned memory goes back to torch's cache with the tensor: the ids outlive it.
        tokens = there.numpy().copy()
        return tokens, tokens < 0

    return result
