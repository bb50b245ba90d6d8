"""How long a step should take, by its tokens: one that never ends is told from a long one."""

from __future__ import annotations

from loramux.speculation.costs import Costs

UNKNOWN_S = 30.0
"""Before anything was measured or seen."""
NEWEST = 0.125
"""The weight of the newest step in what was seen of its size."""


class StepPace:
    """The longer of what ``costs`` says, measured when the server started, and what was seen since,
    by powers of two of a step's tokens: long contexts and adapters are in no table."""

    def __init__(self, costs: Costs | None) -> None:
        self._table = None if costs is None else costs.mixed.seconds
        self._seen: dict[int, float] = {}

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step is done."""
        size = num_tokens.bit_length()
        before = self._seen.get(size, seconds)
        self._seen[size] = before + NEWEST * (seconds - before)

    def predict(self, num_tokens: int) -> float:
        """Seconds for so many tokens. Of a size that was not seen, at most in proportion to the
        next smaller one, else as much as for a larger one."""
        measured = 0.0
        if self._table is not None:
            measured = float(self._table[min(num_tokens, len(self._table) - 1)])
        elif not self._seen:
            return UNKNOWN_S
        return max(measured, self._from_seen(num_tokens.bit_length()))

    def _from_seen(self, size: int) -> float:
        if not self._seen:
            return 0.0
        smaller = max((each for each in self._seen if each <= size), default=None)
        if smaller is None:
            return self._seen[min(self._seen)]
        return self._seen[smaller] * 2.0 ** (size - smaller)
