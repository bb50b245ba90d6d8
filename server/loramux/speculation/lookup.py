"""Copying: what followed the last time the same tokens stood here, in prompt or output.

Prompt lookup takes the longest match of a range of lengths; CopySpec (arXiv 2502.08923) is the same
with one length and a block of fixed size. Nothing is kept between steps: the ids are searched anew,
by whole-array comparisons that leave few places after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loramux.request import Request
from loramux.speculation.drafter import Ask, Guess

COPYSPEC_MATCH = 3
"""The published γ."""


@dataclass(frozen=True)
class Lookup:
    """Matches of ``longest`` down to ``shortest`` ids, the longest first; among equally long ones
    the most recent, or the ``first``."""

    shortest: int = 2
    longest: int = 8
    first: bool = False

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter. A guess's grade is the length of its match."""
        return [self._guess(ask.request, ask.most) for ask in asks]

    def ended(self, request: Request) -> None:
        """See Drafter; nothing was kept."""

    def _guess(self, request: Request, most: int) -> Guess:
        ids = request.ids[: request.num_ids]
        last = len(ids) - 1
        # ends[i]: the last ids stand there too, ending at that place
        ends = np.flatnonzero(ids[:last] == ids[last])
        best, matched = ends[:0], 0
        for length in range(1, self.longest + 1):
            if length >= self.shortest:
                best, matched = ends, length
            longer = ends[(ends >= length) & (ids[ends - length] == ids[last - length])]
            if not len(longer) or length >= last:
                break
            ends = longer
        if not len(best):
            return Guess()
        start = int(best[0 if self.first else -1]) + 1
        copied: list[int] = np.resize(ids[start:], most).tolist()  # what repeats goes on repeating
        return Guess(copied, grade=matched)
