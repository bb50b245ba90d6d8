"""Keyed sampling: ``token = argmin_i E_i / p_i``, the noise E a function of who asks and where.

Since ``E_i`` is Exp(1), the minimum falls on i with probability ``p_i`` (the exponential race, the
Gumbel-max trick in another coordinate). The noise depends on (seed, choice, output position, token
id) alone, so the same request draws the same tokens in any batch, and a draft is right exactly when
it equals what the target draws (Gumbel coupling, arXiv 2408.07978).

**The contract. It is frozen: changing any line changes the tokens of every seeded request.**

* ``key = splitmix64((seed + choice) mod 2^64)``: the first output of SplitMix64 from that state.
  Philox's key words are ``(key mod 2^32, key >> 32)``.
* ``h`` is Philox4x32-10 (Random123) of the counter words
  ``(position mod 2^32, position >> 32, id // 4, 0)``, output lane ``id mod 4``. ``position`` is the
  index of the token within the output: 0 for the first one generated.
* ``v = (h + 0.5) * 2^-32``, ``E = -log1p(-v)``, float64. ``1 - v`` is exact in float64, so
  ``-log(1 - v)`` is the same number up to the last bit; Triton, without log1p, uses that.
* ``x = (l - max l) / T`` and the weight ``w = exp(x)``, float64, from the float32 logits ``l`` left
  by bias, masks and penalties. Weights are not normalised: the argmin does not depend on scale.
* The kept ids are a beginning of the order (l descending, id ascending): ``min_p`` keeps
  ``x >= log(min_p)``; ``top_k`` keeps the first k; ``top_p`` then keeps the shortest beginning of
  what is left whose mass is at least ``top_p`` of the mass left, never less than one id. Mass is
  summed in integers, ``floor(w * 2^40)``: the set does not depend on the order of summation.
* The token is the kept id with the least ``E / w`` (float64), the lowest id on ties; ids with
  ``w = 0`` are never drawn. ``T = 0`` is the greatest logit, the lowest id on ties: no filter can
  change it. ``-0.0`` equals ``0.0``.
* A row with a NaN, a ``+inf`` or no finite logit is *bad*: token -1, and ``bad`` says so. ``-inf``
  is an id that cannot be drawn.

``reference`` is all of it in obvious torch; ``cpu`` (numba) and ``triton_draw`` give equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

_MASK64 = (1 << 64) - 1


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit Philox key of one choice of a request; ``seed`` may be any integer."""
    z = (seed + choice + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


@dataclass(frozen=True)
class DrawParams:
    """What R rows draw with; every field is [R].

    ``temperature`` 0: greedy. ``log_min_p`` -inf, ``top_k`` 0 and ``top_p`` 1 switch a filter off.
    ``key`` holds ``stream_key``s.
    """

    temperature: Float64
    log_min_p: Float64
    top_k: Int64
    top_p: Float64
    key: NDArray[np.uint64]


@dataclass(frozen=True)
class Logprobs:
    """Log-softmax of R rows at a chosen id, and the most likely ids.

    ``chosen`` [R]; ``rank`` [R], 1 for the first id in the order (logit descending, id ascending).
    ``top_ids``/``top`` [R, N]: in that order, N the largest count asked for, -1 and -inf past a
    row's own count (or past the vocabulary). Bad rows: NaN, rank 0 and no top.
    """

    chosen: Float64
    rank: Int64
    top_ids: Int64
    top: Float64


Drawn = tuple[Int64, NDArray[np.bool_]]


def start_draw(logits: torch.Tensor, params: DrawParams, position: Int64) -> Callable[[], Drawn]:
    """Begin to draw from ``logits`` float32 [R, V] at output ``position`` [R].

    What it returns waits for a device and gives token ids [R] and bad flags [R]; ``logits`` may be
    changed by later operations before that."""
    if logits.is_cuda:
        from loramux_kernels.sampling import triton_draw

        return triton_draw.start_draw(logits, params, position)
    from loramux_kernels.sampling import cpu

    drawn = cpu.draw(logits, params, position)
    return lambda: drawn


def draw(logits: torch.Tensor, params: DrawParams, position: Int64) -> Drawn:
    """:func:`start_draw`, and wait."""
    return start_draw(logits, params, position)()


def logprobs(logits: torch.Tensor, ids: Int64, counts: Int64) -> Logprobs:
    """Log-softmax of ``logits`` float32 [R, V] at ``ids`` [R] and ``counts`` [R] top entries."""
    if logits.is_cuda:
        from loramux_kernels.sampling import reference

        return reference.logprobs(logits, ids, counts)
    from loramux_kernels.sampling import cpu

    return cpu.logprobs(logits, ids, counts)


def entropy_bits(logits: torch.Tensor) -> Float64:
    """``-sum p log2 p`` of each row of ``logits`` float32 [R, V], from 0 to log2 V, whatever the
    other rows are. NaN for bad rows."""
    if logits.is_cuda:
        from loramux_kernels.sampling import reference

        return reference.entropy_bits(logits)
    from loramux_kernels.sampling import cpu_entropy

    return cpu_entropy.entropy_bits(logits)
