"""Who guesses ahead: one protocol for all.

A draft costs rows of the same forward pass and is never seen in the output, so a drafter may be
wrong as often as it likes; it must only be quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from loramux.request import Request


class Ask(NamedTuple):
    """How does ``request.ids[:request.num_ids]`` go on, for ``most`` guesses at most?"""

    request: Request
    most: int

    @property
    def may_branch(self) -> bool:
        """The answer may be a tree."""
        speculation = self.request.speculation
        return speculation is not None and speculation.tree


class Guess(NamedTuple):
    """``token_ids`` follow one another, or are a tree: guess i is node i + 1 and would follow node
    ``parents[i]``, at most i; node 0 is the last known token. Any beginning of a guess is one too,
    so what is likely stands first.

    ``grade`` says how sure the drafter is, in a few classes of its own making: how often guesses of
    a grade were right is what their number is chosen by.
    """

    token_ids: Sequence[int] = ()
    parents: Sequence[int] | None = None
    grade: int = 0


class Drafter(Protocol):
    """Guesses how requests go on. What it keeps of one it can make again from its ids."""

    def propose(self, asks: Sequence[Ask]) -> Sequence[Guess]:
        """One answer to each of ``asks``, which have different requests; nothing is fine."""
        ...

    def ended(self, request: Request) -> None:
        """``request`` is over, and was perhaps never asked about."""
        ...
