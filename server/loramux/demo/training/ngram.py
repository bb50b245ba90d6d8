"""The baseline: an interpolated 5-gram with modified Kneser-Ney smoothing (Chen and Goodman, 1999).

It reads the same tokens as the model. A document is padded with ``BEGIN`` on the left, so that no
context reaches into the document before; ``BEGIN`` itself is never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
BITS = 12


def pad(documents: Sequence[Sequence[int]], order: int, begin: int) -> Ints:
    """One stream; each document (given without ``BEGIN``) after ``order - 1`` times ``begin``."""
    head = [begin] * (order - 1)
    return np.array([i for document in documents for i in (*head, *document)], dtype=np.int64)


def grams(stream: Ints, n: int, order: int, begin: int) -> Ints:
    """Every n-gram that ends in a predicted token, as one integer, the oldest token highest."""
    ends = np.flatnonzero(stream != begin)
    assert order * BITS < 64 and (ends.size == 0 or ends[0] >= order - 1)
    packed = np.zeros(ends.size, dtype=np.int64)
    for back in range(n - 1, -1, -1):
        packed = (packed << BITS) | stream[ends - back]
    return packed


def find(keys: Ints, sorted_keys: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The place of each key among the sorted ones, and whether it is there."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys


class KneserNey:
    def __init__(self, stream: Ints, vocabulary: int, begin: int, order: int = 5) -> None:
        assert vocabulary <= 1 << BITS
        self.order, self.begin, self.vocabulary = order, begin, vocabulary
        raw = [
            np.unique(grams(stream, n, order, begin), return_counts=True)
            for n in range(1, order + 1)
        ]
        self.levels = [self._level(raw, n) for n in range(1, order + 1)]

    def _level(
        self, raw: list[tuple[Ints, Ints]], n: int
    ) -> tuple[Ints, Floats, Ints, Floats, Floats]:
        """Keys and discounted counts of order ``n``; contexts, totals and held-back mass."""
        keys, counts = raw[n - 1]
        if n < self.order:
            # A lower order counts the different words before it, unless it begins the document.
            suffix = raw[n][0] & ((1 << BITS * n) - 1)
            found, continuations = np.unique(suffix, return_counts=True)
            assert np.array_equal(found, keys)
            first = keys >> BITS * (n - 1)
            counts = np.where((first == self.begin) & (n > 1), counts, continuations)
        discounts = self._discounts(counts)
        held = discounts[np.minimum(counts, 3)]
        contexts, of = np.unique(keys >> BITS, return_inverse=True)
        totals: Floats = np.bincount(of, weights=counts).astype(np.float64)
        backoff = np.bincount(of, weights=held) / totals
        return keys, counts - held, contexts, totals, backoff

    @staticmethod
    def _discounts(counts: Ints) -> Floats:
        """D1, D2, D3+ from the counts of counts; one half where the data are too few to tell."""
        n1, n2, n3, n4 = (max(int((counts == c).sum()), 0) for c in (1, 2, 3, 4))
        if min(n1, n2, n3, n4) == 0:
            return np.array([0.0, 0.5, 0.5, 0.5])
        y = n1 / (n1 + 2 * n2)
        return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])

    def probabilities(self, stream: Ints) -> Floats:
        """Of every predicted token of a padded stream, given the ``order - 1`` before it."""
        p = np.full(int((stream != self.begin).sum()), 1.0 / (self.vocabulary - 1))
        for n, (keys, kept, contexts, totals, backoff) in enumerate(self.levels, 1):
            wanted = grams(stream, n, self.order, self.begin)
            key, seen = find(wanted, keys)
            context, known = find(wanted >> BITS, contexts)
            higher = np.where(seen, kept[key], 0.0) / totals[context] + backoff[context] * p
            p = np.where(known, higher, p)
        return p

    def perplexity(self, stream: Ints) -> float:
        return float(np.exp(-np.log(self.probabilities(stream)).mean()))
