"""Counting: what has followed most often where the same tokens stood before, in the request itself
and in answers that its owner had from the same adapters (SuffixDecoding, arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux.request import Request
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.stores import Stores, owner
from loramux_kernels.suffix import Continuation, SuffixTree

NAME = "suffix"
DEPTH = 24
"""How many tokens a tree is deep: a match and its continuation together. As published, and so are
the next two."""
FACTOR = 1.0
"""A match of so many tokens is continued by as many."""
LEAST_SHARE = 0.1
"""A token that followed less often is no guess."""
LEAST_SCORE = 0.5
"""With fewer right tokens in prospect the floor is the next drafter's."""
SHARED_TOKENS = 1 << 15
"""Of an owner's answers: the latest."""
MOST_BYTES = 256 << 20
"""Of all trees: half of it the requests', half of it the answers'."""


@dataclass
class Own:
    """A request's own tree, of its first ``seen`` ids."""

    tree: SuffixTree
    reserved_bytes: int
    seen: int = 0


class Suffix:
    """Guesses from a tree of the request and a tree of its owner's answers, whichever expects more
    right tokens. A tree catches up with its request when that is asked about next: only ids that
    are known are ever counted, so nothing is taken back when guesses were wrong."""

    def __init__(self, most_bytes: int = MOST_BYTES, shared_tokens: int = SHARED_TOKENS) -> None:
        self._own: dict[str, Own] = {}
        self._room = most_bytes // 2
        self._shared: Stores[SuffixTree] = Stores(most_bytes // 2)
        self._shared_tokens = shared_tokens
        self._warm_up()

    @property
    def num_bytes(self) -> int:
        """Of all trees at present."""
        return sum(own.tree.num_bytes for own in self._own.values()) + self._shared.num_bytes

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter. A guess's grade is twice the class of its match's length (1, 2 to 3, 4 to 7,
        more), and one more when three quarters of it should be right."""
        return [self._guess(ask) for ask in asks]

    def ended(self, request: Request) -> None:
        """See Drafter: an answer that could be guessed ahead is one to learn from."""
        if (own := self._own.pop(request.id, None)) is not None:
            self._room += own.reserved_bytes
        if request.speculation is not None and NAME in request.speculation.drafters:
            # An id that was still expected is not known.
            answer = request.ids[request.num_prompt : request.num_ids - request.expects]
            self._learn(request, answer[max(0, len(answer) - self._shared_tokens) :])

    @staticmethod
    def _warm_up() -> None:
        """Nobody shall wait for the first call, which takes a thousand times as long as others."""
        tree = SuffixTree(DEPTH)
        tree.add(np.zeros(2, np.int64))
        _guessed(tree, np.zeros(1, np.int64), 1, False)
        tree.drop()

    def _guess(self, ask: Ask) -> Guess:
        request = ask.request
        context = request.ids[: request.num_ids]
        best = Continuation([], [], 0.0, 0)
        # The latter wins where both expect the same.
        for tree in (self._shared.use(owner(request)), self._caught_up(request)):
            if tree is not None:
                found = _guessed(tree, context, ask.most, ask.may_branch)
                if found.score >= best.score:
                    best = found
        if best.score < LEAST_SCORE:
            return Guess()
        sure = best.score >= 0.75 * len(best.token_ids)
        grade = 2 * min(3, best.matched.bit_length() - 1) + sure
        return Guess(best.token_ids, best.parents if ask.may_branch else None, grade)

    def _caught_up(self, request: Request) -> SuffixTree | None:
        """The request's own tree, of all it has by now; None while there is no room for one."""
        own = self._own.get(request.id)
        if own is None:
            needed = SuffixTree.bytes_for(request.max_ids)
            if needed > self._room:
                return None
            self._room -= needed
            self._own[request.id] = own = Own(SuffixTree(DEPTH), needed)
            own.tree.add(np.empty(0, np.int64))
        if own.seen < request.num_ids:
            own.tree.extend(request.ids[own.seen : request.num_ids])
            own.seen = request.num_ids
        return own.tree

    def _learn(self, request: Request, answer: npt.NDArray[np.int64]) -> None:
        if not len(answer):
            return
        whose = owner(request)
        tree = self._shared.use(whose) or SuffixTree(DEPTH)
        while tree.num_tokens + len(answer) > self._shared_tokens:
            tree.drop()
        tree.add(answer)
        self._shared.keep(whose, tree)


def _guessed(
    tree: SuffixTree, context: npt.NDArray[np.int64], most: int, branch: bool
) -> Continuation:
    return tree.guess(context, most, factor=FACTOR, offset=0.0, least=LEAST_SHARE, branch=branch)
