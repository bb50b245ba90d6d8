"""Which token follows two others, with weights that grow as texts are seen; and what is likely to
follow at some length, by tree search (adaptive draft-verification, arXiv 2407.12021).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Found", "TrigramTable"]

FEWEST_ROWS = 1024


class Found(NamedTuple):
    """``token_ids`` are a tree by ``parents``: token i is node i + 1, node 0 is what they follow.
    ``visits``: how often the search came to each of them. ``weight``: the first one's."""

    token_ids: list[int]
    parents: list[int]
    visits: list[int]
    weight: float


class TrigramTable:
    """The successors of pairs of tokens, the twelve heaviest or latest of each, of at most about
    ``most_rows`` pairs (a power of two); of more, the latest."""

    def __init__(self, most_rows: int) -> None:
        self._kernels = import_module(f"{__name__}.cpu")
        self._most_rows = most_rows
        self._arrays = self._empty(min(FEWEST_ROWS, most_rows))
        self._filled = 0
        self._now = 0

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def learn(self, ids: npt.NDArray[np.int64], *, more: float, cap: float) -> None:
        """Every three of ``ids`` in a row: the third's weight behind the other two grows by
        ``more``, up to ``cap``."""
        while (rows := len(self._arrays[0])) < self._most_rows and (
            2 * (self._filled + len(ids)) > rows
        ):
            arrays = self._empty(2 * rows)
            self._filled = self._kernels.move(*self._arrays, *arrays)
            self._arrays = arrays
        self._filled += self._kernels.learn(*self._arrays, ids, self._now, more, cap)
        self._now += len(ids)

    def successors(self, a: int, b: int) -> dict[int, float]:
        """What followed ``a``, ``b``, the heaviest first, and its weight."""
        pairs, _, tokens, weights = self._arrays
        (rows,) = np.nonzero(pairs == (a << 32 | b) + 1)
        return {
            int(token): float(weight)
            for row in rows
            for token, weight in zip(tokens[row], weights[row], strict=True)
            if weight
        }

    def search(
        self,
        a: int,
        b: int,
        most: int,
        *,
        iterations: int,
        depth: int,
        c1: float,
        c2: float,
        seed: int,
        branch: bool,
    ) -> Found:
        """At most ``most`` tokens that may follow ``a``, ``b``; nothing where the pair is unknown.

        Each of the ``iterations`` walks down to a node that has no children yet, always to the
        child with the greatest ``Q / N + (c1 + ln((N_parent + c2 + 1) / c2)) P sqrt(N_parent) /
        (1 + N)``, gives it those that the table knows unless it is ``depth`` tokens ahead, goes on
        to that depth at random, and rewards all nodes it came through with 1 plus the weights it
        met. P is the child's share of its siblings' weights. With ``branch`` the answer is
        the tree of the most visited nodes, else the line that is always the most visited child.
        """
        answer, visits = np.empty((2, most), np.int64), np.empty(most, np.int64)
        num, weight = self._kernels.search(
            *self._arrays, a, b, iterations, depth, c1, c2, seed, branch, answer, visits
        )
        token_ids, parents = answer[:, :num].tolist()
        return Found(token_ids, parents, visits[:num].tolist(), weight)

    def _empty(self, rows: int) -> tuple[npt.NDArray[Any], ...]:
        successors = self._kernels.SUCCESSORS
        return (
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, successors), np.int32),
            np.zeros((rows, successors), np.float32),
        )
