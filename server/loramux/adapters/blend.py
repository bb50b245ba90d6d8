"""New adapters from existing ones: sums, TIES and DARE, per-layer scales, lower ranks.

Everything is defined on what a pair changes, ``scale * B A``, and done one module after the other.
Sums stay in factors: pairs that stand side by side are exactly their sum. TIES and DARE look at
single values of the changes, so there the module's changes are made, one source at a time: about
five matrices [out, in] of float32 are in memory at once, however many sources there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loramux.adapters.canonical import TOKEN_MODULES, CanonicalAdapter, LoraPair, Matrix, widen
from loramux.adapters.problems import Problems
from loramux.wire import TABLE_MODULES, BaseDescription, BlendRecipe, module_path

FIELDS: Mapping[str, tuple[str, ...]] = {
    "soup": ("rank",),
    "ties": ("rank", "density", "majority_sign_method"),
    "dare_ties": ("rank", "density", "majority_sign_method", "seed"),
    "dare_linear": ("rank", "density", "seed"),
    "scale_layers": ("alpha", "beta"),
    "compress": ("rank",),
}
"""By method: the fields of a BlendRecipe that it reads."""

_BLOCK = 1 << 22
_DRAWS = 1 << 32

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Module = tuple[int, str]


@dataclass(frozen=True)
class Source:
    """An adapter, its weight in the blend, and what to call it in a problem."""

    name: str
    adapter: CanonicalAdapter
    weight: float


@dataclass(frozen=True)
class Term:
    """What one source, the ``number``-th, does to a module: ``factor * B A``."""

    number: int
    pair: LoraPair
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.pair.scale

    def a(self) -> Float32:
        """[rank, in]."""
        return _values(self.pair.a)

    def b(self) -> Float32:
        """[out, rank]."""
        return _values(self.pair.b)


@dataclass
class Blend:
    """A recipe applied to sources. ``ranks``: that of every module of the result, in its order.

    Raises AdapterInvalid listing the sources that are more than pairs, or the modules whose rank
    this base's server does not take.
    """

    sources: Sequence[Source]
    recipe: BlendRecipe
    base: BaseDescription
    ranks: dict[Module, int] = field(init=False)
    _terms: dict[Module, list[Term]] = field(init=False)
    _kept: dict[Module, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        for source in self.sources:
            if source.adapter.vectors or source.adapter.tokens:
                problems.add(
                    f"{source.name} is more than low-rank pairs (DoRA, IA3, trained biases, norms"
                    " or token rows), of which no blend is defined"
                )
        problems.raise_any()
        self._terms = self._by_module()
        self.ranks = {at: self._rank(at, terms) for at, terms in self._terms.items()}
        if not self.ranks:
            problems.add("none of the sources changes anything")
            problems.raise_any()
        largest = max(self.ranks.values())
        if largest > self.base.max_rank:
            at = next(at for at, rank in self.ranks.items() if rank == largest)
            hint = "; with a rank the sum is compressed to it" if not self.recipe.rank else ""
            problems.add(
                f"{module_path(*at)} would have rank {largest}; this server takes up to"
                f" {self.base.max_rank}{hint}",
                "rank_too_large",
            )
            problems.raise_any()

    def pairs(self) -> Iterator[tuple[Float32, Float32]]:
        """A [rank, in] and B [out, rank] of every module of ``ranks``; their scale is 1."""
        for at, terms in self._terms.items():
            if self._is_dense:
                merged = self._merged(at, terms)
                a, b, kept = _best_of_matrix(merged, self.ranks[at])
            elif self.ranks[at] < sum(term.pair.rank for term in terms):
                a, b, kept = _best_of_pairs(terms, self.ranks[at])
            else:
                a, b = _stacked(terms)
                kept = _squared_norm(terms) if self.recipe.rank else (0.0, 0.0)
            self._kept[at] = kept
            yield a, b

    def report(self) -> dict[str, Any]:
        """After ``pairs``: which share of the squared norm (Frobenius) the rank lets through, in
        all and in the module that loses most. Empty for a method that loses nothing."""
        if not self.recipe.rank:
            return {}
        shares = {at: _share(*kept) for at, kept in self._kept.items()}
        worst = min(shares, key=lambda at: shares[at])
        kept, whole = (sum(pair[side] for pair in self._kept.values()) for side in (0, 1))
        return {
            "kept": _share(kept, whole),
            "worst": {"module": module_path(*worst), "kept": shares[worst]},
        }

    @property
    def _is_dense(self) -> bool:
        return self.recipe.method in ("ties", "dare_ties", "dare_linear")

    def _by_module(self) -> dict[Module, list[Term]]:
        found: dict[Module, list[Term]] = {}
        for number, source in enumerate(self.sources):
            for pair in (pair.folded() for pair in source.adapter.pairs):
                at = pair.layer, pair.module
                weight = source.weight * self._layer_scale(*at)
                found.setdefault(at, []).append(Term(number, pair, weight))
        order = sorted(found, key=lambda at: (at[0], TABLE_MODULES.index(at[1])))
        return {at: found[at] for at in order}

    def _layer_scale(self, layer: int, module: str) -> float:
        """LiNeS (arXiv 2410.17146): alpha in the first block, alpha + beta in the last, in a line
        between them; alpha outside the blocks."""
        if self.recipe.method != "scale_layers":
            return 1.0
        depth = 0.0 if module in TOKEN_MODULES else layer / max(1, self.base.num_layers - 1)
        return self.recipe.alpha + self.recipe.beta * depth

    def _rank(self, at: Module, terms: list[Term]) -> int:
        together = sum(term.pair.rank for term in terms)
        if not self._is_dense and not 0 < self.recipe.rank < together:
            return together
        return min(self.recipe.rank, *self.base.table_widths[at[1]])

    def _merged(self, at: Module, terms: list[Term]) -> Float32:
        """The module's changes as one [out, in]: PEFT's ``ties``, ``dare_ties``, ``dare_linear``.

        The sign that wins at a place is that of the sum of the pruned changes, or of most of them,
        weights aside (arXiv 2306.01708); those of that sign are weighted and averaged.
        """
        elects = self.recipe.method != "dare_linear"
        positive = self._elected(at, terms) if elects else None
        merged = np.zeros(self.base.table_widths[at[1]][::-1], np.float32)
        count = np.zeros(merged.shape, np.uint8)
        for term in terms:
            change = self._pruned(at, term)
            if positive is not None:
                agrees = np.where(positive, change > 0, change < 0)
                change *= agrees
                count += agrees
            change *= np.float32(term.weight)
            merged += change
        merged /= np.maximum(count, 1)
        return merged

    def _elected(self, at: Module, terms: list[Term]) -> npt.NDArray[np.bool_]:
        """Where the positive sign wins."""
        total = np.zeros(self.base.table_widths[at[1]][::-1], np.float32)
        for term in terms:
            change = self._pruned(at, term)
            if self.recipe.majority_sign_method == "frequency":
                np.sign(change, out=change)
            total += change
        return total >= 0

    def _pruned(self, at: Module, term: Term) -> Float32:
        change = term.b() @ term.a()
        change *= np.float32(term.pair.scale)
        if self.recipe.density >= 1:
            return change
        if self.recipe.method == "ties":
            return _keep_largest(change, self.recipe.density)
        key = (self.recipe.seed, at[0], TABLE_MODULES.index(at[1]), term.number)
        return _keep_some(change, self.recipe.density, key)


def _values(matrix: Matrix) -> Float32:
    return widen(matrix.read(), matrix.dtype)


def _stacked(terms: Sequence[Term]) -> tuple[Float32, Float32]:
    """The sum of the terms as one pair of all their ranks. (The average of factors would be
    something else; the average of models is that of what they change, arXiv 2203.05482.)"""
    halves = [(term.b() * np.float64(term.factor)).astype(np.float32) for term in terms]
    return np.concatenate([term.a() for term in terms]), np.concatenate(halves, axis=1)


def _wide(terms: Sequence[Term]) -> tuple[Float64, Float64]:
    a = np.concatenate([term.a() for term in terms], dtype=np.float64)
    b = np.concatenate([term.b() * np.float64(term.factor) for term in terms], axis=1)
    return a, b


def _squared_norm(terms: Sequence[Term]) -> tuple[float, float]:
    """That of the sum, twice: all of it is kept."""
    a, b = _wide(terms)
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return squared, squared


def _best_of_pairs(terms: Sequence[Term], rank: int) -> tuple[Float32, Float32, Any]:
    """The best approximation of the terms' sum: A, B, and (kept, whole) squared norms.

    Between orthonormal bases of the factors stands a small matrix; its singular values are the
    sum's, which is never made.
    """
    a, b = _wide(terms)
    base_b, core_b = np.linalg.qr(b)
    base_a, core_a = np.linalg.qr(a.T)
    u, s, vh = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    new_a = root[:, None] * (vh[:rank] @ base_a.T)
    new_b = (base_b @ u[:, :rank]) * root
    kept = float((s[:rank] ** 2).sum()), float((s**2).sum())
    return new_a.astype(np.float32), new_b.astype(np.float32), kept


def _best_of_matrix(matrix: Float32, rank: int) -> tuple[Float32, Float32, Any]:
    """The same for any matrix [out, in].

    Through the eigenvectors of its smaller Gram matrix, in float64: many times faster than its
    singular values, and what squaring loses there is below the matrix's own precision.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    flat = matrix.T if tall else matrix
    step = max(1, _BLOCK // len(flat))
    blocks = [slice(at, at + step) for at in range(0, flat.shape[1], step)]
    gram = np.zeros((len(flat), len(flat)))
    for columns in blocks:
        block = flat[:, columns].astype(np.float64)
        gram += block @ block.T
    values, vectors = np.linalg.eigh(gram)
    kept = float(values[::-1][:rank].clip(0).sum()), float(np.trace(gram))
    top = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    other = np.concatenate(
        [(top.T @ flat[:, columns].astype(np.float64)).astype(np.float32) for columns in blocks],
        axis=1,
    )
    near = top.astype(np.float32)
    return (near.T, other.T, kept) if tall else (other, near, kept)


def _keep_largest(change: Float32, density: float) -> Float32:
    """Zero but for the ``int(density * size)`` largest values; of equal ones the first."""
    count = int(density * change.size)
    sizes = np.abs(change).reshape(-1)
    if not count:
        return np.zeros_like(change)
    sizes.partition(change.size - count)
    limit = sizes[change.size - count]
    del sizes
    stays = np.abs(change).reshape(-1)
    equal = np.flatnonzero(stays == limit)
    above = stays > limit
    above[equal[: count - np.count_nonzero(above)]] = True
    change *= above.reshape(change.shape)
    return change


def _keep_some(change: Float32, density: float, key: Sequence[int]) -> Float32:
    """DARE (arXiv 2311.03099): each value stays with probability ``density``, and is divided by
    it. The draws depend on ``key`` alone: Philox's raw bits, whose stream numpy keeps as it is."""
    bits = np.random.Philox(np.random.SeedSequence(key))
    flat = change.reshape(-1)
    limit = round(density * _DRAWS)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        raw = np.asarray(bits.random_raw((block.size + 1) // 2), "<u8")
        block *= raw.view("<u4")[: block.size] < limit
        block /= np.float32(density)
    return change


def _share(kept: float, whole: float) -> float:
    return min(1.0, kept / whole) if whole else 1.0
