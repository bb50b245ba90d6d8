"""Who guesses ahead: one protocol, and the order in which a request's drafters are asked.

A draft costs a row of the same forward pass and is never seen in the output, so a drafter may be
wrong as often as it likes; it must only be quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from loramux.request import Request


class Tree(NamedTuple):
    """Several ways to go on at once. Guess i is node i + 1 and would follow node ``parents[i]``, at
    most i; node 0 is the last known token."""

    token_ids: Sequence[int]
    parents: Sequence[int]


class Drafter(Protocol):
    """Guesses how a request goes on."""

    def propose(self, request: Request, most: int) -> Sequence[int] | Tree:
        """Up to ``most`` ids that may follow ``request.ids[:request.num_ids]``, one after the other
        or as a tree; none is fine."""
        ...


class Draft(NamedTuple):
    """What to verify, and whose it is. ``parents`` as in :class:`Tree`; None: a chain."""

    drafter: str
    token_ids: Sequence[int]
    parents: Sequence[int] | None = None


class Drafting:
    """The ``drafters`` of an engine by name."""

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self.drafters = dict(drafters)

    def propose(self, request: Request, room: int) -> Draft | None:
        """The guess of the first of the request's drafters that has one."""
        assert request.speculation is not None
        most = min(room, request.speculation.max_draft_tokens)
        if most > 0:
            for name in request.speculation.drafters:
                guess = self.drafters[name].propose(request, most)
                token_ids, parents = guess if isinstance(guess, Tree) else (guess, None)
                if parents is not None and list(parents) == list(range(len(parents))):
                    parents = None  # it does not branch, and a chain is cheaper
                if token_ids:
                    return Draft(name, token_ids, parents)
        return None
