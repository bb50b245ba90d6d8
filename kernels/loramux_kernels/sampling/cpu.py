"""``loramux_kernels.sampling`` for CPUs (numba): one thread a row, no scratch as long as a row.

A row is walked in groups of ``GROUP`` ids whose maxima are found first; most work is not doing
things to most groups. Filters look only where an id may still matter. The race needs neither a
logarithm nor an exponential for most ids, since ``E >= v``: an id can only beat the best score so
far if ``v < w * best``. That test is done in float32 on a bound that errs on the safe side; a group
with an id that passes it gets the exact float64 scores.
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
# Scalars inside kernels: numba infers their exact type, and mypy cannot follow numpy's mixtures.
Real = Any
Whole = Any

GROUP = 128
_MASS_ONE = float(1 << 40)
_NO_MASS = -28.0  # e^-28 < 2^-40
_BINS = 32.0
# The rank key of -inf with the greatest id; numba would compile twice for a plain constant.
_KEEP_ALL = np.int64((0xFF000001 << 31) | 0x7FFFFFFF)
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
def _order(logit: Real) -> Whole:
    """An int32 that sorts as the float does; NaNs end up beyond the infinities."""
    bits = np.float32(logit + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_jit
def _unorder(key: Whole) -> Real:
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@_jit
def _rank_key(logit: Real, token: Whole) -> Whole:
    """An int64 that ascends in the frozen order: logit descending, id ascending."""
    return ((np.int64(_INF_KEY) - np.int64(_order(logit))) << np.int64(31)) | np.int64(token)


@_jit
def _logit_of(rank_key: Whole) -> Real:
    return _unorder(np.int32(np.int64(_INF_KEY) - (rank_key >> np.int64(31))))


@_jit
def _exponent(logit: Real, peak: Real, temperature: Real) -> Real:
    """x = (l - peak) / T. Widened by name: numba's ``float()`` of a float32 stays one."""
    return (np.float64(logit) - np.float64(peak)) / temperature


@_fused
def _exp(x: Real) -> Real:
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
def _group(row: Row, g: Whole) -> Row:
    return row[g * GROUP : min((g + 1) * GROUP, len(row))]


@_jit
def _maxima(row: Row, maxima: Row) -> tuple[Whole, bool]:
    """Fills ``maxima`` [groups]; returns (lowest id of the row's maximum, is the row bad)."""
    top: Whole = -_INF_KEY - 1
    bottom: Whole = _INF_KEY
    best_group = 0
    for g in range(len(maxima)):
        group = _group(row, g)
        high = np.int32(-0x7FFFFFFF)
        low = np.int32(0x7FFFFFFF)
        for i in range(len(group)):
            key = np.int32(_order(group[i]))
            high = max(high, key)
            low = min(low, key)
        maxima[g] = _unorder(high)
        bottom = min(bottom, low)
        if high > top:
            top = high
            best_group = g
    # Beyond the keys of the infinities lie those of the NaNs, on the side of their sign.
    if top >= _INF_KEY or bottom < -_INF_KEY - 1 or top == -_INF_KEY - 1:
        return -1, True
    first = best_group * GROUP
    while row[first] != maxima[best_group]:
        first += 1
    return first, False


@_jit
def _hash(key: np.uint64, position: np.uint64, group: Whole, out: NDArray[np.uint32]) -> None:
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
def _score(h: np.uint32, x: Real) -> Real:
    """E / w, +inf where w is 0."""
    weight = math.exp(x)
    if weight == 0.0:
        return math.inf
    return -math.log1p(-((h + 0.5) * _TWO_M32)) / weight


@_jit
def _race(
    row: Row,
    maxima: Row,
    peak_id: Whole,
    temperature: Real,
    cut: Whole,
    key: np.uint64,
    position: np.uint64,
) -> Whole:
    """The kept id with the least E / w.

    With s = log2 e / T, an id is out if log2 v >= s (l - peak) + log2 best. The left side is
    bounded from below by the bits of float32(h): exponent plus mantissa never exceed the true
    logarithm. ``slack`` covers the float32 roundings of both sides.
    """
    h = np.empty(GROUP, np.uint32)
    peak = row[peak_id]
    last_logit = _logit_of(cut)
    _hash(key, position, peak_id // 4, h[:4])
    best_id = peak_id
    best = _score(h[peak_id % 4], 0.0)
    slope = np.float32(_LOG2E / temperature)
    slack = 2.0**-9
    level = np.float32(math.log2(best) + slack)
    for g in range(len(maxima)):
        # v is never below 2^-33, so a group this far down needs not even a hash.
        if maxima[g] < last_logit or slope * (maxima[g] - peak) + level < np.float32(-33.0):
            continue
        group = _group(row, g)
        _hash(key, position, g * (GROUP // 4), h[: (len(group) + 3) // 4 * 4])
        hits = 0
        for i in range(len(group)):
            bits = np.float32(h[i]).view(np.int32)
            log2_v = np.float32(bits) * np.float32(2.0**-23) - np.float32(127 + 32)
            hits += not log2_v >= slope * (group[i] - peak) + level
        if hits == 0:
            continue
        for i in range(len(group)):
            token = g * GROUP + i
            if _rank_key(group[i], token) > cut:
                continue
            score = _score(h[i], _exponent(group[i], peak, temperature))
            if score < best or (score == best and token < best_id):
                best, best_id = score, token
        level = np.float32(math.log2(best) + slack)
    return best_id


@_jit
def _least_logit(peak: Real, temperature: Real, x: Real) -> Real:
    """The least float32 logit whose exponent is at least x, for -inf < x <= 0: bisects its bits."""
    low, high = np.int64(-_INF_KEY - 1), np.int64(_order(peak))
    while high - low > 1:
        middle = (low + high) >> 1
        if _exponent(_unorder(np.int32(middle)), peak, temperature) >= x:
            high = middle
        else:
            low = middle
    return _unorder(np.int32(high))


@_jit
def _mass(logit: Real, peak: Real, temperature: Real) -> Real:
    """floor(w * 2^40), an integer held in float64."""
    return np.floor(_exp(_exponent(logit, peak, temperature)) * _MASS_ONE)


@_jit
def _mass_by_bin(row: Row, maxima: Row, temperature: Real, cut: Whole) -> Int64:
    """The mass kept by ``cut`` in bins of exponents: bin b holds -b < x * _BINS <= 1 - b."""
    peak = maxima.max()
    last_logit = _logit_of(cut)
    sums = np.zeros(int(-_NO_MASS * _BINS) + 2, np.int64)
    masses = np.empty(GROUP, np.float64)
    bins = np.empty(GROUP, np.float64)
    for g in range(len(maxima)):
        if maxima[g] < last_logit or _exponent(maxima[g], peak, temperature) < _NO_MASS:
            continue
        group = _group(row, g)
        for i in range(len(group)):
            x = max(_exponent(group[i], peak, temperature), _NO_MASS)
            masses[i] = np.floor(_exp(x) * _MASS_ONE)
            bins[i] = np.ceil(-x * _BINS)
        if cut != _KEEP_ALL:
            for i in range(len(group)):
                if _rank_key(group[i], g * GROUP + i) > cut:
                    masses[i] = 0.0
        for i in range(len(group)):
            sums[int(bins[i])] += np.int64(masses[i])
    return sums


@_jit
def _gather(row: Row, maxima: Row, low: Real, high: Real, cut: Whole) -> Int64:
    """Rank keys of the kept ids with low <= logit < high."""
    count = 0
    for g in range(len(maxima)):
        if maxima[g] >= low:
            group = _group(row, g)
            for i in range(len(group)):
                count += (group[i] >= low) & (group[i] < high)
    keys = np.empty(count, np.int64)
    found = 0
    for g in range(len(maxima)):
        if maxima[g] >= low:
            group = _group(row, g)
            for i in range(len(group)):
                if group[i] >= low and group[i] < high:
                    rank_key = _rank_key(group[i], g * GROUP + i)
                    if rank_key <= cut:
                        keys[found] = rank_key
                        found += 1
    return keys[:found]


@_jit
def _select(
    keys: Int64, peak: Real, temperature: Real, by_mass: bool, done: Whole, need: Real
) -> Whole:
    """The rank key at which ``done`` plus ``keys``, in ascending order, reach ``need``.

    Counted in mass or, where peak and temperature do not matter, in ids. A quickselect: ``keys``
    lose their order. All that is added are integers, so the pivots do not influence the result.
    """
    low, high = 0, len(keys)
    pivot = np.int64(0)
    while low < high:
        middle = (low + high) // 2
        pivot = keys[middle]
        keys[middle] = keys[high - 1]
        split = low
        below = np.int64(0)
        for i in range(low, high - 1):
            key = keys[i]
            if key < pivot:
                keys[i] = keys[split]
                keys[split] = key
                split += 1
                below += np.int64(_mass(_logit_of(key), peak, temperature)) if by_mass else 1
        keys[high - 1] = keys[split]
        keys[split] = pivot
        own = np.int64(_mass(_logit_of(pivot), peak, temperature)) if by_mass else np.int64(1)
        if float(done + below) >= need:
            high = split
        elif float(done + below + own) >= need:
            break
        else:
            done += below + own
            low = split + 1
    return pivot


@_jit
def _top_k(row: Row, maxima: Row, count: Whole) -> Whole:
    """The rank key of the ``count``-th id."""
    low = np.float32(-np.inf)
    if count <= len(maxima):
        # That many groups have a maximum that reaches this, hence at least that many ids do.
        places = np.empty(len(maxima), np.int64)
        for g in range(len(maxima)):
            places[g] = _rank_key(maxima[g], g)
        low = _logit_of(_select(places, low, 1.0, False, np.int64(0), float(count)))
    keys = _gather(row, maxima, low, np.float32(np.inf), _KEEP_ALL)
    return _select(keys, low, 1.0, False, np.int64(0), float(count))


@_jit
def _top_p(row: Row, maxima: Row, temperature: Real, cut: Whole, share: Real) -> Whole:
    """The rank key at which the ids kept by ``cut`` hold ``share`` of their mass."""
    peak = maxima.max()
    sums = _mass_by_bin(row, maxima, temperature, cut)
    need = share * float(sums.sum())
    before = np.int64(0)
    b = 0
    while float(before + sums[b]) < need:
        before += sums[b]
        b += 1
    low = _least_logit(peak, temperature, -b / _BINS)
    high = _least_logit(peak, temperature, (1 - b) / _BINS) if b > 0 else np.float32(np.inf)
    keys = _gather(row, maxima, low, high, cut)
    return _select(keys, peak, temperature, True, before, need)


@_jit
def _cut(
    row: Row, maxima: Row, temperature: Real, log_min_p: Real, top_k: Whole, top_p: Real
) -> Whole:
    """The rank key of the last kept id of a row."""
    cut = _KEEP_ALL
    if 0 < top_k < len(row):
        cut = _top_k(row, maxima, top_k)
    if log_min_p > -np.inf:
        logit = _least_logit(maxima.max(), temperature, log_min_p)
        cut = min(cut, _rank_key(logit, len(row)))
    if top_p < 1.0:
        cut = _top_p(row, maxima, temperature, cut, top_p)
    return cut


@_jit
def _new_maxima(row: Row) -> Row:
    return np.empty((len(row) + GROUP - 1) // GROUP, np.float32)


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
        maxima = _new_maxima(row)
        token[r], bad[r] = _maxima(row, maxima)
        t = temperature[r]
        if not bad[r] and t > 0.0:
            cut = _cut(row, maxima, t, log_min_p[r], top_k[r], top_p[r])
            token[r] = _race(row, maxima, token[r], t, cut, key[r], np.uint64(position[r]))


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
def _log_total(row: Row, maxima: Row) -> Real:
    """log sum exp(l), summed in columns so that the order is fixed and the loop is SIMD."""
    peak = np.float64(maxima.max())
    columns = np.zeros(GROUP, np.float64)
    for g in range(len(maxima)):
        group = _group(row, g)
        for i in range(len(group)):
            columns[i] += _exp(np.float64(group[i]) - peak)
    return math.log(columns.sum()) + peak


@_jit
def _rank(row: Row, token: Whole) -> Whole:
    """1 + the number of ids before ``token`` in the frozen order."""
    own = row[token]
    rank = 1
    for i in range(len(row)):
        rank += row[i] > own
    for i in range(token):
        rank += row[i] == own
    return rank


@_jit
def _top(row: Row, maxima: Row, count: Whole) -> Int64:
    """The first ``count`` ids of the row's order."""
    cut = _top_k(row, maxima, count)
    keys = _gather(row, maxima, _logit_of(cut), np.float32(np.inf), cut)
    keys.sort()
    return keys & np.int64(0x7FFFFFFF)


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
        maxima = _new_maxima(row)
        if _maxima(row, maxima)[1]:
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
