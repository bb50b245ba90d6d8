"""Three in a row: a table of what follows two tokens grows with the text of an owner's requests,
and a tree search draws from it what may come next (ADED, arXiv 2407.12021).

The paper begins with a table that was counted in a corpus; this one begins with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loramux.request import Request
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.stores import Stores, owner
from loramux_kernels.trigram import Found, TrigramTable

NAME = "trigram"
STEP, CAP = 0.04, 3.0
"""What a weight grows by at each occurrence, and up to where. These and the next are published."""
ITERATIONS = 150
DEPTH = 4
C1, C2 = 32.0, 8.0
SEED = 0x9E3779B97F4A7C15
MOST_ROWS = 1 << 15
"""Pairs of tokens that an owner's table has room for."""
MOST_BYTES = 128 << 20
"""Of all tables."""


class Trigram:
    """Guesses what the search visits most. Where the last two tokens were never seen: nothing."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_rows: int = MOST_ROWS) -> None:
        self._tables: Stores[TrigramTable] = Stores(most_bytes)
        self._most_rows = most_rows
        self._seen: dict[str, int] = {}
        self._warm_up()

    @property
    def num_bytes(self) -> int:
        """Of all tables at present."""
        return self._tables.num_bytes

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter. A guess's grade is the quarter of the search that went to its first token (0
        to 3), and 4 more when that was seen there twice."""
        return [self._guess(ask) for ask in asks]

    def ended(self, request: Request) -> None:
        """See Drafter."""
        if request.speculation is not None and NAME in request.speculation.drafters:
            # An id that was still expected is not known.
            self._learn(request, request.num_ids - request.expects)
        self._seen.pop(request.id, None)

    @staticmethod
    def _warm_up() -> None:
        """Nobody shall wait for the first call, which takes a thousand times as long as others."""
        table = TrigramTable(1 << 4)
        table.learn(np.zeros(40, np.int64), more=STEP, cap=CAP)
        _searched(table, 0, 0, 1, False)

    def _guess(self, ask: Ask) -> Guess:
        request = ask.request
        table = self._learn(request, request.num_ids)
        if table is None:
            return Guess()
        a, b = request.ids[request.num_ids - 2 : request.num_ids].tolist()
        found = _searched(table, a, b, ask.most, ask.may_branch)
        if not found.token_ids:
            return Guess()
        quarter = min(3, 4 * found.visits[0] // ITERATIONS)
        twice = found.weight > 1.5 * STEP
        return Guess(
            found.token_ids, found.parents if ask.may_branch else None, quarter + 4 * twice
        )

    def _learn(self, request: Request, known: int) -> TrigramTable | None:
        """The table of the request's owner, with all there is of it by now; None: there is none, or
        the request has no two tokens to look up."""
        if known < 2:
            return None
        whose = owner(request)
        table = self._tables.use(whose)
        seen = self._seen.get(request.id, 0)
        if known > max(seen, 2):
            table = table or TrigramTable(self._most_rows)
            table.learn(request.ids[max(0, seen - 2) : known], more=STEP, cap=CAP)
            self._tables.keep(whose, table)
            self._seen[request.id] = known
        return table


def _searched(table: TrigramTable, a: int, b: int, most: int, branch: bool) -> Found:
    return table.search(
        a,
        b,
        most,
        iterations=ITERATIONS,
        depth=DEPTH,
        c1=C1,
        c2=C2,
        seed=SEED,
        branch=branch,
    )
