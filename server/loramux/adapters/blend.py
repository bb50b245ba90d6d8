"""New adapters from existing ones: sums, TIES and DARE, per-layer scales, lower ranks.

Everything works on low-rank pairs in float32; what a pair changes is ``scale * B A``. Adapters that
are more than pairs (DoRA, IA3, trained biases) are refused: no sum of theirs is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from loramux.adapters.canonical import CanonicalAdapter, Computed, LoraPair, Matrix, widen
from loramux.errors import InvalidRequest
from loramux.wire import MODULES

Float32 = npt.NDArray[np.float32]
Module = tuple[int, str]
Sources = Sequence[tuple[CanonicalAdapter, float]]
"""Adapters and their weights in the blend."""

MIN_DENSITY = 0.001


def soup(sources: Sources) -> CanonicalAdapter:
    """``sum_k w_k * change_k``, exactly: the pairs stand side by side, so ranks add up. (The
    average of the factors would be something else; model soups are arXiv 2203.05482.)"""
    pairs = []
    for (layer, module), terms in _by_module(sources).items():
        rank = sum(pair.rank for pair, _ in terms)
        width_in, width_out = terms[0][0].a.shape[1], terms[0][0].b.shape[0]
        a = Computed((rank, width_in), partial(_stack_a, terms))
        b = Computed((width_out, rank), partial(_stack_b, terms))
        pairs.append(LoraPair(layer, module, rank, 1.0, a, b))
    return CanonicalAdapter("float32", tuple(pairs))


def ties(sources: Sources, *, rank: int, density: float) -> CanonicalAdapter:
    """TIES (arXiv 2306.01708) at ``rank``, as PEFT's ``ties_svd``: of each change the ``density``
    largest values stay, the sign with the larger sum is elected value by value, and the weighted
    values of that sign are averaged; then the best approximation of that rank."""
    _check(rank, density)
    return _merged(sources, rank, lambda delta: _largest(delta, density))


def dare_ties(sources: Sources, *, rank: int, density: float, seed: int) -> CanonicalAdapter:
    """DARE (arXiv 2311.03099) with TIES' election, as PEFT's ``dare_ties_svd``: each value stays
    with probability ``density`` and is divided by it. The same seed gives the same adapter."""
    _check(rank, density)
    source = np.random.Generator(np.random.Philox(seed))
    return _merged(sources, rank, lambda delta: _random(delta, density, source))


def per_layer(
    adapter: CanonicalAdapter, first: float, last: float, layers: int
) -> CanonicalAdapter:
    """LiNeS (arXiv 2410.17146): scales that grow in a line from the first layer to the last."""
    pairs = []
    for pair in _pairs_of(adapter):
        share = pair.layer / max(1, layers - 1)
        scale = pair.scale * (first + (last - first) * share)
        pairs.append(replace(pair, scale=float(np.float32(scale))))
    return replace(adapter, pairs=tuple(pairs))


def recompress(adapter: CanonicalAdapter, rank: int) -> tuple[CanonicalAdapter, float]:
    """The best approximation of at most ``rank``, and the share of the squared norm it keeps."""
    _check(rank, 1.0)
    pairs, kept, whole = [], 0.0, 0.0
    for pair in _pairs_of(adapter):
        if pair.rank <= rank:
            squared = float((np.linalg.svd(_core(pair)[1])[1] ** 2).sum())
            pairs.append(pair)
            kept, whole = kept + squared, whole + squared
            continue
        (q_b, core, q_a) = _core(pair)
        u, s, vh = np.linalg.svd(core)
        root = np.sqrt(s[:rank])
        a = (root[:, None] * (vh[:rank] @ q_a.T)).astype(np.float32)
        b = ((q_b @ u[:, :rank]) * root).astype(np.float32)
        pairs.append(_pair(pair.layer, pair.module, a, b))
        kept, whole = kept + float((s[:rank] ** 2).sum()), whole + float((s**2).sum())
    return CanonicalAdapter("float32", tuple(pairs)), kept / whole if whole else 1.0


def _check(rank: int, density: float) -> None:
    if rank < 1:
        raise InvalidRequest("rank: must be at least 1", param="rank")
    if not MIN_DENSITY <= density <= 1:
        raise InvalidRequest(f"density: must be {MIN_DENSITY} to 1", param="density")


def _pairs_of(adapter: CanonicalAdapter) -> tuple[LoraPair, ...]:
    if adapter.vectors:
        raise InvalidRequest(
            "only adapters that are low-rank pairs can be blended; one has gains or shifts (DoRA, "
            "IA3, trained biases)",
            param="blend",
        )
    return adapter.pairs


def _by_module(sources: Sources) -> dict[Module, list[tuple[LoraPair, float]]]:
    found: dict[Module, list[tuple[LoraPair, float]]] = {}
    for adapter, weight in sources:
        for pair in _pairs_of(adapter):
            found.setdefault((pair.layer, pair.module), []).append((pair, weight))
    return dict(sorted(found.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1]))))


def _values(matrix: Matrix) -> Float32:
    return widen(matrix.read(), matrix.dtype)


def _stack_a(terms: Iterable[tuple[LoraPair, float]]) -> Float32:
    return np.concatenate([_values(pair.a) for pair, _ in terms])


def _stack_b(terms: Iterable[tuple[LoraPair, float]]) -> Float32:
    return np.concatenate(
        [np.float32(weight * pair.scale) * _values(pair.b) for pair, weight in terms], axis=1
    )


def _core(pair: LoraPair) -> tuple[npt.NDArray[np.float64], ...]:
    """Orthonormal bases around a small matrix: ``scale * B A = q_b core q_a^T``, in float64."""
    q_b, r_b = np.linalg.qr(_values(pair.b).astype(np.float64))
    q_a, r_a = np.linalg.qr(_values(pair.a).astype(np.float64).T)
    return q_b, pair.scale * r_b @ r_a.T, q_a


def _pair(layer: int, module: str, a: Float32, b: Float32) -> LoraPair:
    return LoraPair(
        layer, module, len(a), 1.0, Computed(a.shape, lambda: a), Computed(b.shape, lambda: b)
    )


def _merged(sources: Sources, rank: int, prune: Callable[[Float32], Float32]) -> CanonicalAdapter:
    pairs = []
    for (layer, module), terms in _by_module(sources).items():
        deltas = np.stack(
            [prune(np.float32(p.scale) * (_values(p.b) @ _values(p.a))) for p, _ in terms]
        )
        weights = np.array([weight for _, weight in terms], np.float32)[:, None, None]
        elected = np.where(deltas.sum(axis=0) >= 0, 1, -1)
        agree = np.sign(deltas) == elected
        merged = (deltas * weights * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        u, s, vh = np.linalg.svd(merged, full_matrices=False)
        kept = min(rank, len(s))
        b = (u[:, :kept] * s[:kept]).astype(np.float32)
        pairs.append(_pair(layer, module, vh[:kept].astype(np.float32), b))
    return CanonicalAdapter("float32", tuple(pairs))


def _largest(delta: Float32, density: float) -> Float32:
    count = int(density * delta.size)
    if count >= delta.size:
        return delta
    chosen = np.argpartition(np.abs(delta).reshape(-1), delta.size - count)[delta.size - count :]
    kept = np.zeros(delta.size, np.float32)
    kept[chosen] = delta.reshape(-1)[chosen]
    return kept.reshape(delta.shape)


def _random(delta: Float32, density: float, source: np.random.Generator) -> Float32:
    if density >= 1:
        return delta
    stays = source.random(delta.shape) < density
    return np.where(stays, delta / np.float32(density), np.float32(0)).astype(np.float32)
