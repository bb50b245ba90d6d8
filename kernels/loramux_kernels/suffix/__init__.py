"""How often every sequence of up to so many tokens occurs in texts that come and go, and how one
goes on: a suffix tree of limited depth (SuffixDecoding, arXiv 2411.04975).
"""

from __future__ import annotations

from collections import deque
from importlib import import_module
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Continuation", "SuffixTree"]

FEWEST = 256
"""Tokens there is room for from the start."""
NODE_BYTES = 44
TOKEN_BYTES = 2 * (NODE_BYTES + 4) + 4
"""Each token begins a suffix, which has a node that it ends at and perhaps one where it left the
others; there are as many hash chains as nodes."""


class Continuation(NamedTuple):
    """``token_ids`` are a tree by ``parents``: token i is node i + 1, node 0 is what it continues.
    ``score`` is the sum of the shares with which they followed, which is how many of them are
    right if things go as before; ``matched`` is how many of the last tokens had been seen."""

    token_ids: list[int]
    parents: list[int]
    score: float
    matched: int


class SuffixTree:
    """Counts of all sequences of up to ``depth`` tokens in texts. Memory follows the tokens that
    are in it: ``TOKEN_BYTES`` each when it is full, and all arrays double together."""

    def __init__(self, depth: int) -> None:
        self._kernels = import_module(f"{__name__}.cpu")
        self._depth = depth
        self._lengths: deque[int] = deque()
        self._end = 0
        self.num_tokens = 0
        self._nodes: npt.NDArray[np.int32]
        self._text: npt.NDArray[np.int32]
        self._resize(FEWEST)

    @property
    def num_bytes(self) -> int:
        return self._nodes.nbytes + self._heads.nbytes + self._text.nbytes

    @staticmethod
    def bytes_for(num_tokens: int) -> int:
        """What a tree takes that has come to hold so many."""
        capacity = max(FEWEST, 1 << (num_tokens - 1).bit_length())
        return capacity * TOKEN_BYTES + NODE_BYTES  # the root is nobody's

    def add(self, token_ids: npt.NDArray[np.int64]) -> None:
        """A new text."""
        self._lengths.append(0)
        self.extend(token_ids)

    def extend(self, token_ids: npt.NDArray[np.int64]) -> None:
        """The newest text goes on."""
        more, last = len(token_ids), self._lengths[-1]
        capacity = len(self._text)
        while capacity < self.num_tokens + more:
            capacity *= 2
        if capacity > len(self._text):
            self._resize(capacity)
        end = self._end
        self._kernels.extend(
            self._nodes, self._heads, self._text, end - last, end, token_ids, self._depth
        )
        self._lengths[-1] += more
        self.num_tokens += more
        self._end += more

    def drop(self) -> None:
        """Forget the oldest text. No count tells that it ever was there."""
        start, length = self._oldest, self._lengths.popleft()
        self._kernels.forget(
            self._nodes, self._heads, self._text, start, start + length, self._depth
        )
        self.num_tokens -= length

    def count(self, token_ids: npt.NDArray[np.int64]) -> int:
        """How often ``token_ids``, 1 to ``depth`` of them, occur."""
        times: int = self._kernels.count(self._nodes, self._heads, self._text, token_ids)
        return times

    def guess(
        self,
        context: npt.NDArray[np.int64],
        most: int,
        *,
        factor: float,
        offset: float,
        least: float,
        branch: bool,
    ) -> Continuation:
        """How ``context`` goes on, in at most ``most`` tokens.

        For each number of its last tokens that occur in the tree: on from there to what followed
        most often, the latest of equals, as long as that has a share of ``least`` (above 0) of all
        that followed, and for ``factor`` times that number plus ``offset`` tokens at most. What has
        the greatest score is taken, from the longest match of equals. With ``branch`` it may
        be a tree: always the likeliest next token of all ways on.
        """
        answer = np.empty((2, most), np.int64)
        num, score, matched = self._kernels.guess(
            self._nodes,
            self._heads,
            self._text,
            self._oldest,
            context[max(0, len(context) - self._depth + 1) :],
            factor,
            offset,
            least,
            branch,
            answer,
        )
        token_ids, parents = answer[:, :num].tolist()
        return Continuation(token_ids, parents, score, matched)

    @property
    def _oldest(self) -> int:
        return self._end - self.num_tokens

    def _resize(self, capacity: int) -> None:
        """Have room for ``capacity`` tokens, a power of two."""
        nodes = np.zeros((2 * capacity + 1, NODE_BYTES // 4), np.int32)
        text = np.zeros(capacity, np.int32)
        self._heads = np.zeros(2 * capacity, np.int32)
        if self.num_tokens:
            nodes[: len(self._nodes)] = self._nodes
            places = np.arange(self._oldest, self._end)
            text[places & (capacity - 1)] = self._text[places & (len(self._text) - 1)]
            self._kernels.find_again(nodes, self._heads)
        self._nodes, self._text = nodes, text
