"""``loramux_kernels.sampling`` for CPUs (numba): one thread a row, no scratch as long as a row.

A row is walked in blocks of 1024 ids whose maxima are found first. Most ids are settled without a
logarithm and most blocks without a hash, since ``E >= v >= 2^-33``: an id can only beat the best
score so far if ``v < w * best``. That test is done in float32 on a bound that errs on the safe
side; ids that pass it get the exact float64 score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray

from loramux_kernels.sampling import DrawParams, Float64, Int64, Logprobs

Row = NDArray[np.float32]
F = TypeVar("F", bound=Callable[..., Any])

BLOCK = 1024
_LANES = 64
_MASS_ONE = float(1 << 40)
_LOG2E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01
_ROUND = 6755399441055744.0
_LN2_LOW = 1.90821492927058770002e-10
_INF_KEY = 0x7F800000
_M32 = np.uint64(0xFFFFFFFF)
_TWO_M32 = 2.0**-32


def _jit(function: F) -> F:
    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled


def _fused(function: F) -> F:
    """Lets a * b + c round once; nothing else of the arithmetic is loosened."""
    compiled: F = numba.njit(cache=True, nogil=True, fastmath={"contract"})(function)
    return compiled


def _parallel(function: F) -> F:
    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)(function)
    return compiled


@_jit
def _order(logit: np.float32) -> np.int32:
    """An int32 that sorts as the float does; NaNs end up beyond the infinities."""
    bits = np.float32(logit + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_jit
def _unorder(key: np.int32) -> np.float32:
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@_fused
def _exp(x: float) -> float:
    """e^x for x <= 0 within two ulps, e^-700 below that; no call, so loops over it become SIMD."""
    x = max(x, -700.0)
    # Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits, for the exponent.
    shifted = x * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1.0 / 6227020800
    p = p * r + 1.0 / 479001600
    p = p * r + 1.0 / 39916800
    p = p * r + 1.0 / 3628800
    p = p * r + 1.0 / 362880
    p = p * r + 1.0 / 40320
    p = p * r + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = np.float64(p).view(np.int64) + (np.float64(shifted).view(np.int64) << np.int64(52))
    return np.int64(bits).view(np.float64)


@_jit
def _block_maxima(row: Row, maxima: Row) -> tuple[int, bool]:
    """Fills ``maxima`` [blocks]; returns (lowest id of the row's maximum, is the row bad)."""
    top = np.int32(-0x7FFFFFFF)
    bottom = np.int32(0x7FFFFFFF)
    best_block = 0
    for b in range(len(maxima)):
        block = row[b * BLOCK : min((b + 1) * BLOCK, len(row))]
        high = np.int32(-0x7FFFFFFF)
        low = np.int32(0x7FFFFFFF)
        for i in range(len(block)):
            key = _order(block[i])
            high = max(high, key)
            low = min(low, key)
        maxima[b] = _unorder(high)
        bottom = min(bottom, low)
        if high > top:
            top = high
            best_block = b
    lowest = -_INF_KEY - 1
    bad = top >= _INF_KEY or bottom < lowest or top == lowest
    peak = _unorder(top)
    first = best_block * BLOCK
    while not bad and row[first] != peak:
        first += 1
    return first, bad


@_jit
def _hash_block(key: np.uint64, position: np.uint64, group: int, out: NDArray[np.uint32]) -> None:
    """Philox4x32-10 of ``len(out) // 4`` counters from ``group`` on, into ``out``."""
    for i in range(len(out) // 4):
        k0 = key & _M32
        k1 = key >> np.uint64(32)
        c0 = position & _M32
        c1 = position >> np.uint64(32)
        c2 = np.uint64(group + i)
        c3 = np.uint64(0)
        for _ in range(10):
            p0 = c0 * np.uint64(0xD2511F53)
            p1 = c2 * np.uint64(0xCD9E8D57)
            c0 = (p1 >> np.uint64(32)) ^ c1 ^ k0
            c2 = (p0 >> np.uint64(32)) ^ c3 ^ k1
            c1 = p1 & _M32
            c3 = p0 & _M32
            k0 = (k0 + np.uint64(0x9E3779B9)) & _M32
            k1 = (k1 + np.uint64(0xBB67AE85)) & _M32
        out[4 * i] = np.uint32(c0)
        out[4 * i + 1] = np.uint32(c1)
        out[4 * i + 2] = np.uint32(c2)
        out[4 * i + 3] = np.uint32(c3)


@_jit
def _score(h: np.uint32, x: float) -> float:
    """E / w, +inf where w is 0."""
    weight = math.exp(x)
    if weight == 0.0:
        return math.inf
    return -math.log1p(-((h + 0.5) * _TWO_M32)) / weight


@_jit
def _race(
    row: Row,
    maxima: Row,
    peak_id: int,
    temperature: float,
    cut: tuple[np.float32, int],
    key: np.uint64,
    position: np.uint64,
) -> int:
    """The kept id with the least E / w.

    With s = log2 e / T, an id is out if log2 v >= s (l - peak) + log2 best. The left side is
    bounded from below by the bits of float32(h): exponent plus mantissa never exceed the true
    logarithm. ``slack`` covers the float32 roundings of both sides.
    """
    cut_logit, cut_id = cut
    h = np.empty(BLOCK, np.uint32)
    peak = row[peak_id]
    group = peak_id // 4
    _hash_block(key, position, group, h[:4])
    best_id = peak_id
    best = _score(h[peak_id - 4 * group], 0.0)
    slope = np.float32(_LOG2E / temperature)
    slack = 2.0**-9
    level = np.float32(math.log2(best) + slack)
    for b in range(len(maxima)):
        if maxima[b] < cut_logit or slope * (maxima[b] - peak) + level < np.float32(-33.0):
            continue
        start = b * BLOCK
        block = row[start : min(start + BLOCK, len(row))]
        _hash_block(key, position, start // 4, h[: (len(block) + 3) // 4 * 4])
        for first in range(0, len(block), _LANES):
            part, hashes = block[first : first + _LANES], h[first : first + _LANES]
            hits = 0
            for i in range(len(part)):
                bits = np.float32(hashes[i]).view(np.int32)
                log2_v = np.float32(bits) * np.float32(2.0**-23) - np.float32(127 + 32)
                hits += not log2_v >= slope * (part[i] - peak) + level
            if hits == 0:
                continue
            for i in range(len(part)):
                logit, token = part[i], start + first + i
                if logit < cut_logit or (logit == cut_logit and token > cut_id):
                    continue
                x = (np.float64(logit) - np.float64(peak)) / temperature
                score = _score(hashes[i], x)
                if score < best or (score == best and token < best_id):
                    best, best_id = score, token
            level = np.float32(math.log2(best) + slack)
    return best_id


@_jit
def _mass(logit: np.float32, peak: np.float32, temperature: float) -> float:
    """floor(w * 2^40), an integer held in float64."""
    return np.floor(_exp((np.float64(logit) - np.float64(peak)) / temperature) * _MASS_ONE)


@_jit
def _place(logit: np.float32) -> np.int64:
    """32 bits that ascend as the logit descends."""
    return np.int64(0x7FFFFFFF) - np.int64(_order(logit))


@_jit
def _digit_sums(
    row: Row,
    maxima: Row,
    temperature: float,
    cut: tuple[np.float32, int],
    by_mass: bool,
    prefix: int,
    shift: int,
    sums: Int64,
) -> None:
    """Adds up mass (or counts) of the kept ids below ``prefix``, by the next 11 bits of place."""
    cut_logit, cut_id = cut
    peak = maxima.max()
    masses = np.ones(BLOCK, np.float64)
    # Only the first pass looks at every id, so only there is weighing whole blocks (SIMD) cheaper.
    whole_blocks = by_mass and prefix == 0
    sums[:] = 0
    for b in range(len(maxima)):
        if maxima[b] < cut_logit or (_place(maxima[b]) >> (shift + 11)) > prefix:
            continue
        start = b * BLOCK
        block = row[start : min(start + BLOCK, len(row))]
        if whole_blocks:
            for i in range(len(block)):
                masses[i] = _mass(block[i], peak, temperature)
        for i in range(len(block)):
            place = _place(block[i])
            if (place >> (shift + 11)) != prefix:
                continue
            if block[i] < cut_logit or (block[i] == cut_logit and start + i > cut_id):
                continue
            if by_mass and not whole_blocks:
                masses[i] = _mass(block[i], peak, temperature)
            sums[(place >> shift) & 2047] += np.int64(masses[i])


@_jit
def _select(
    row: Row,
    maxima: Row,
    temperature: float,
    cut: tuple[np.float32, int],
    by_mass: bool,
    amount: float,
) -> tuple[np.float32, int]:
    """The (logit, id) at which the ids kept by ``cut`` reach ``amount``, in the frozen order.

    ``amount`` is a share of their mass, or a number of ids. A radix select over the place of a
    logit (11, 11 and 10 bits), as top-k kernels on GPUs do: no sort, and exact, because what is
    summed are integers.
    """
    sums = np.empty(2048, np.int64)
    prefix = np.int64(0)
    done = np.int64(0)
    need = amount
    for shift in (22, 11, 0):
        _digit_sums(row, maxima, temperature, cut, by_mass, prefix, shift, sums)
        if by_mass and shift == 22:
            need = amount * float(sums.sum())
        digit = 0
        while float(done + sums[digit]) < need:
            done += sums[digit]
            digit += 1
        prefix = (prefix << np.int64(11)) | np.int64(digit)
    logit = _unorder(np.int32(np.int64(0x7FFFFFFF) - prefix))
    each = np.int64(_mass(logit, maxima.max(), temperature)) if by_mass else np.int64(1)
    token = -1
    while float(done) < need:
        token += 1
        if token % BLOCK == 0:
            while maxima[token // BLOCK] < logit:
                token += BLOCK
        if row[token] == logit:
            done += each
    return logit, token


@_jit
def _min_p_logit(peak: np.float32, temperature: float, log_min_p: float) -> np.float32:
    """The least float32 l with (l - peak) / T >= log min_p, found by bisection of its bits."""
    low, high = np.int64(-_INF_KEY - 1), np.int64(_order(peak))
    while high - low > 1:
        middle = (low + high) >> 1
        x = (np.float64(_unorder(np.int32(middle))) - np.float64(peak)) / temperature
        if x >= log_min_p:
            high = middle
        else:
            low = middle
    return _unorder(np.int32(high))


@_jit
def _cut(
    row: Row, maxima: Row, temperature: float, log_min_p: float, top_k: int, top_p: float
) -> tuple[np.float32, int]:
    """The last kept (logit, id) of a row."""
    cut = (np.float32(-np.inf), len(row))
    if 0 < top_k < len(row):
        cut = _select(row, maxima, temperature, cut, False, float(top_k))
    if log_min_p > -np.inf:
        logit = _min_p_logit(maxima.max(), temperature, log_min_p)
        if logit > cut[0]:
            cut = (logit, len(row))
    if top_p < 1.0:
        cut = _select(row, maxima, temperature, cut, True, top_p)
    return cut


@_parallel
def _draw(
    logits: NDArray[np.float32],
    temperature: Float64,
    log_min_p: Float64,
    top_k: Int64,
    top_p: Float64,
    key: NDArray[np.uint64],
    position: Int64,
    token: Int64,
    bad: NDArray[np.bool_],
) -> None:
    for r in prange(logits.shape[0]):
        row = logits[r]
        maxima = np.empty((len(row) + BLOCK - 1) // BLOCK, np.float32)
        peak_id, bad[r] = _block_maxima(row, maxima)
        if bad[r]:
            token[r] = -1
        elif temperature[r] == 0.0:
            token[r] = peak_id
        else:
            t = temperature[r]
            cut = _cut(row, maxima, t, log_min_p[r], top_k[r], top_p[r])
            token[r] = _race(row, maxima, peak_id, t, cut, key[r], np.uint64(position[r]))


def draw(
    logits: torch.Tensor, params: DrawParams, position: Int64
) -> tuple[Int64, NDArray[np.bool_]]:
    """See ``loramux_kernels.sampling.draw``."""
    rows = logits.shape[0]
    token, bad = np.empty(rows, np.int64), np.empty(rows, np.bool_)
    _draw(
        logits.numpy(),
        params.temperature,
        params.log_min_p,
        params.top_k,
        params.top_p,
        params.key,
        position,
        token,
        bad,
    )
    return token, bad


@_jit
def _log_total(row: Row, maxima: Row) -> float:
    """log sum exp(l), summed in 1024 columns so that the order is fixed and the loop is SIMD."""
    peak = maxima.max()
    columns = np.zeros(BLOCK, np.float64)
    for b in range(len(maxima)):
        block = row[b * BLOCK : min((b + 1) * BLOCK, len(row))]
        for i in range(len(block)):
            columns[i] += _exp(np.float64(block[i]) - np.float64(peak))
    return math.log(columns.sum()) + np.float64(peak)


@_jit
def _rank(row: Row, token: int) -> int:
    """1 + the number of ids before ``token`` in the frozen order."""
    own = row[token]
    rank = 1
    for i in range(len(row)):
        rank += row[i] > own
    for i in range(token):
        rank += row[i] == own
    return rank


@_jit
def _top(row: Row, maxima: Row, count: int) -> Int64:
    """The first ``count`` ids of the frozen order."""
    cut_logit, cut_id = _cut(row, maxima, 1.0, -np.inf, count, 1.0)
    places = np.empty(count, np.int64)
    found = 0
    for b in range(len(maxima)):
        if maxima[b] < cut_logit:
            continue
        start = b * BLOCK
        block = row[start : min(start + BLOCK, len(row))]
        for i in range(len(block)):
            token = start + i
            if block[i] > cut_logit or (block[i] == cut_logit and token <= cut_id):
                places[found] = (_place(block[i]) << np.int64(31)) | np.int64(token)
                found += 1
    places.sort()
    return places & np.int64(0x7FFFFFFF)


@_parallel
def _logprobs(
    logits: NDArray[np.float32],
    ids: Int64,
    counts: Int64,
    chosen: Float64,
    rank: Int64,
    top_ids: Int64,
    top: Float64,
) -> None:
    for r in prange(logits.shape[0]):
        row = logits[r]
        maxima = np.empty((len(row) + BLOCK - 1) // BLOCK, np.float32)
        _, bad = _block_maxima(row, maxima)
        if bad:
            continue
        total = _log_total(row, maxima)
        chosen[r] = np.float64(row[ids[r]]) - total
        rank[r] = _rank(row, ids[r])
        if counts[r] > 0:
            best = _top(row, maxima, min(counts[r], len(row)))
            for i in range(len(best)):
                top_ids[r, i] = best[i]
                top[r, i] = np.float64(row[best[i]]) - total


def logprobs(logits: torch.Tensor, ids: Int64, counts: Int64) -> Logprobs:
    """See ``loramux_kernels.sampling.logprobs``."""
    shape = (len(ids), int(counts.max(initial=0)))
    out = Logprobs(
        chosen=np.full(len(ids), np.nan),
        rank=np.zeros(len(ids), np.int64),
        top_ids=np.full(shape, -1, np.int64),
        top=np.full(shape, -np.inf),
    )
    _logprobs(logits.numpy(), ids, counts, out.chosen, out.rank, out.top_ids, out.top)
    return out
