"""Who guesses ahead: one protocol for all.

A draft costs rows of the same forward pass and is never seen in the output, so a drafter may be
wrong as often as it likes; it must only be quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loramux.request import BASE_MODEL_ID, Request

if TYPE_CHECKING:
    import torch

OF_THE_TARGET = frozenset({"draft", "medusa"})
"""Drafters that know how the target goes on: by a model made after it, or from what it computed. Of
a request that another model serves now they are not asked."""


class Ask(NamedTuple):
    """How does ``request.ids[:request.num_ids]`` go on, for ``most`` guesses at most?"""

    request: Request
    most: int

    @property
    def may_branch(self) -> bool:
        """The answer may be a tree."""
        speculation = self.request.speculation
        return speculation is not None and speculation.tree

    @property
    def drafters(self) -> tuple[str, ...]:
        """Those of the request's that can know how the model goes on which serves it now."""
        speculation = self.request.speculation
        assert speculation is not None
        if self.request.kv.model_id == BASE_MODEL_ID:
            return speculation.drafters
        return tuple(name for name in speculation.drafters if name not in OF_THE_TARGET)


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


class HiddenReader(Protocol):
    """A drafter that looks at what the target has computed."""

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        """``hidden[i]`` of ``[R, hidden]``, which may be kept, is what the output matrix read when
        the last token of ``requests[i]`` was drawn."""
        ...
