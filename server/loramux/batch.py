"""What the scheduler asks for: a row is a request and the number of its tokens this step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loramux.request import Adapters, Kv, Request


def depths(length: int, parents: Sequence[int] | None) -> Sequence[int]:
    """How far ahead the nodes of ``length`` guesses are: of the root 0, and so on."""
    if parents is None:
        return range(length + 1)
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


@dataclass(slots=True)
class Row:
    """``num_tokens`` tokens of ``request``, beginning where ``kv`` ends: the request's own, or what
    another model has of it. It ``samples`` when it reaches the request's last token, so that there
    is a next. The last tokens may be ``drafts``, guesses of ``drafter`` at what comes after that,
    of a ``grade`` of its own; behind each it samples too.

    Guesses may be a tree: then the row has one known token, its node 0, the guesses are nodes 1, 2,
    ..., and ``parents[i]`` is the node that guess i would follow, an earlier one. None: a chain.
    """

    request: Request
    num_tokens: int
    kv: Kv = field(init=False)
    samples: bool = field(init=False)
    drafts: Sequence[int] = ()
    parents: Sequence[int] | None = None
    drafter: str = ""
    grade: int = 0

    def __post_init__(self) -> None:
        request = self.request
        self.kv = request.kv
        reached = self.kv.num_computed + self.num_tokens
        self.samples = reached == request.num_ids < request.max_ids

    @property
    def num_samples(self) -> int:
        """Tokens that are drawn for this row."""
        return self.samples + len(self.drafts)

    @property
    def depth(self) -> int:
        """How many tokens ahead the furthest guess is."""
        return max(depths(len(self.drafts), self.parents))

    def guessed(self) -> list[Sequence[int]]:
        """For each token that is drawn behind a guess: the guesses that lead there, it included."""
        if self.parents is None:
            return [self.drafts[:ahead] for ahead in range(1, len(self.drafts) + 1)]
        ways: list[Sequence[int]] = [()]
        for token, parent in zip(self.drafts, self.parents, strict=True):
            ways.append((*ways[parent], token))
        return ways[1:]


@dataclass(slots=True)
class Batch:
    """The rows of one step on one model, equal adapter lists side by side."""

    model_id: int
    rows: list[Row]
    num_adapters: int

    @classmethod
    def of(cls, model_id: int, rows: Iterable[Row]) -> Batch:
        """Group ``rows`` by adapter list, in order of first appearance."""
        groups: dict[Adapters, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.kv.adapters, []).append(row)
        return cls(model_id, [row for group in groups.values() for row in group], len(groups))

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)
