"""Who guesses ahead: one protocol, and the order in which a request's drafters are asked.

A draft costs rows of the same forward pass and is never seen in the output, so a drafter may be
wrong as often as it likes; it must only be quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from loramux.request import Request

if TYPE_CHECKING:
    import torch


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


@runtime_checkable
class HiddenReader(Protocol):
    """A drafter that looks at what the target has computed."""

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        """``hidden[i]`` of ``[R, hidden]``, which may be kept, is what the output matrix read when
        the last token of ``requests[i]`` was drawn."""
        ...


class Draft(NamedTuple):
    """What to verify, and whose it is."""

    drafter: str
    guess: Guess


class Drafting:
    """The ``drafters`` of an engine by name."""

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self.drafters = dict(drafters)

    def propose(self, asks: Sequence[Ask], budget: int) -> list[Draft | None]:
        """For each of ``asks`` the guess of the first of its request's drafters that has one, as
        far as a ``budget`` of guessed tokens goes."""
        drafts: list[Draft | None] = [None] * len(asks)
        unanswered = [index for index, ask in enumerate(asks) if min(ask.most, budget) > 0]
        place = 0
        while unanswered:
            for name, those in self._by_drafter(asks, unanswered, place).items():
                answers = self.drafters[name].propose([asks[index] for index in those])
                for index, guess in zip(those, answers, strict=True):
                    if guess.token_ids:
                        drafts[index] = Draft(name, guess)
            place += 1
            unanswered = [
                index
                for index in unanswered
                if drafts[index] is None and place < len(_drafters(asks[index]))
            ]
        return _within(drafts, budget)

    def reads(self, request: Request) -> bool:
        """One of the request's drafters is a HiddenReader."""
        speculation = request.speculation
        return speculation is not None and any(
            hasattr(self.drafters[name], "saw") for name in speculation.drafters
        )

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        """See HiddenReader."""
        for drafter in self.drafters.values():
            if isinstance(drafter, HiddenReader):
                drafter.saw(requests, hidden)

    def ended(self, request: Request) -> None:
        """``request`` is over."""
        for drafter in self.drafters.values():
            drafter.ended(request)

    @staticmethod
    def _by_drafter(
        asks: Sequence[Ask], indices: Sequence[int], place: int
    ) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(_drafters(asks[index])[place], []).append(index)
        return groups


def _drafters(ask: Ask) -> Sequence[str]:
    assert ask.request.speculation is not None
    return ask.request.speculation.drafters


def _within(drafts: list[Draft | None], budget: int) -> list[Draft | None]:
    """``drafts`` cut to ``budget`` tokens in all, the first ones first. A tree that does not branch
    is a chain, which is cheaper."""
    cut: list[Draft | None] = []
    for draft in drafts:
        if draft is not None:
            token_ids, parents, grade = draft.guess
            token_ids = token_ids[:budget]
            budget -= len(token_ids)
            if parents is not None:
                parents = parents[: len(token_ids)]
                if list(parents) == list(range(len(parents))):
                    parents = None
            draft = Draft(draft.drafter, Guess(token_ids, parents, grade)) if token_ids else None
        cut.append(draft)
    return cut
