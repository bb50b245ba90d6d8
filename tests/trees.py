"""Random trees of guesses for tests, in plain words: ``parents[i]`` is the parent of node i + 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_parents(rng: np.random.Generator, guesses: int) -> list[int]:
    """Any tree of so many guesses: bushy ones, and now and then a chain or a star."""
    kind = rng.integers(6)
    if kind == 0:
        return list(range(guesses))
    if kind == 1:
        return [0] * guesses
    reach = int(rng.integers(1, guesses + 2))
    return [int(rng.integers(max(0, node - reach), node + 1)) for node in range(guesses)]


def way_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root down to ``node``, both included."""
    way = [node]
    while way[-1]:
        way.append(parents[way[-1] - 1])
    return way[::-1]
