"""What the scheduler asks for: a row is a request and the number of its tokens this step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loramux.request import Adapters, Request


@dataclass(slots=True)
class Row:
    """``num_tokens`` tokens of ``request``, beginning at its ``num_computed``-th. It ``samples``
    when it reaches the request's last token, so that there is a next. The last tokens may be
    ``drafts``, guesses of ``drafter`` at what comes after that; behind each it samples too."""

    request: Request
    num_tokens: int
    samples: bool = field(init=False)
    drafts: Sequence[int] = ()
    drafter: str = ""

    def __post_init__(self) -> None:
        request = self.request
        reached = request.num_computed + self.num_tokens
        self.samples = reached == request.num_ids < request.max_ids

    @property
    def num_samples(self) -> int:
        """Tokens that are drawn for this row."""
        return self.samples + len(self.drafts)


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
            groups.setdefault(row.request.adapters, []).append(row)
        return cls(model_id, [row for group in groups.values() for row in group], len(groups))

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)
