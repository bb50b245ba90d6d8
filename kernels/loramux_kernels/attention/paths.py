"""Trees of guesses: rows of a request of which each sees its own ancestors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Paths:
    """Which rows of a step are nodes of a tree, and what lies between the root and each.

    Row t's path is ``nodes[start[t]:start[t+1]]``: rows of its request in this step, counted from
    0, from the root (always 0) down to itself. It is empty for a row of a chain. Where a request
    held c tokens before this step, row t is its token c + len(path) - 1, and token c + d of what
    the row sees is the d-th of its path, whose key and value lie where token c + node of a chain
    would: every node has a place of its own. ``start`` is [rows + 1]; both are int32.
    """

    start: npt.NDArray[np.int32]
    nodes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[int], parents: Sequence[Sequence[int] | None]) -> Paths | None:
        """The paths of requests with so many ``rows`` each; None when no request is a tree.

        ``parents[r]`` is None for a chain, else it holds the parents of request r's rows 1, 2, ...,
        each an earlier row. ValueError where it does not.
        """
        if all(mine is None for mine in parents):
            return None
        lengths: list[int] = []
        nodes: list[int] = []
        for count, mine in zip(rows, parents, strict=True):
            if mine is None:
                lengths += [0] * count
                continue
            if len(mine) + 1 != count:
                raise ValueError(f"Paths: a tree of {count} rows has {len(mine)} parents")
            paths = [[0]]
            for node, parent in enumerate(mine, start=1):
                if not 0 <= parent < node:
                    raise ValueError(f"Paths: {parent} is no parent for a tree's node {node}")
                paths.append([*paths[parent], node])
            for path in paths:
                lengths.append(len(path))
                nodes += path
        start = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=start[1:])
        return cls(start, np.array(nodes, np.int32))

    @property
    def num_rows(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """A node's depth and one; 0 for rows of a chain."""
        return np.diff(self.start)
