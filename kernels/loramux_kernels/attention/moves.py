"""Which keys and values have to move so that a path through a tree lies in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux_kernels.attention.pages import Pages


@dataclass(frozen=True)
class Moves:
    """Tokens to copy, request after request: of layer l the one at byte ``source[l, i]`` (its first
    key head's) to ``target[l, i]``. A request's own are ``start[r]:start[r+1]`` and go down in
    order, so that none overwrites what a later one takes: they must be made one by one. Of
    different requests none meets another's.

    ``source`` and ``target`` have as many layers as the pages' ``offsets``.
    """

    source: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]

    @classmethod
    def of(cls, pages: Pages, kept: Mapping[int, Sequence[int]]) -> Moves | None:
        """What brings the nodes ``kept[r]`` (rows of request r, from 0) behind each other, each to
        the place its position in the list says; None when all of them are there. ValueError when
        they are not ascending rows of the request."""
        num_rows = np.diff(pages.row_start)
        request: list[int] = []
        source: list[int] = []
        target: list[int] = []
        start = [0]
        for owner, nodes in kept.items():
            rows = int(num_rows[owner])
            if any(a >= b for a, b in zip([-1, *nodes], [*nodes, rows], strict=True)):
                raise ValueError(f"compact: {list(nodes)} are not ascending rows of {rows}")
            held = int(pages.context[owner]) - rows
            moved = [(node, place) for place, node in enumerate(nodes) if node != place]
            if moved:
                request += [owner] * len(moved)
                source += [held + node for node, _ in moved]
                target += [held + place for _, place in moved]
                start.append(len(source))
        if not source:
            return None

        def lie(tokens: list[int]) -> npt.NDArray[np.int64]:
            page, within = np.divmod(np.array(tokens, np.int64), pages.page_tokens)
            at: npt.NDArray[np.int64] = pages.offsets[:, request, page]
            return np.ascontiguousarray(at + within * (pages.head_dim * pages.dtype.itemsize))

        return cls(lie(source), lie(target), np.array(start, np.int32))
