"""What a plan promised, and what came of it.

A plan is the best of many that were guessed at, so it is mostly worse than it looked, and where a
step takes a millisecond its guesses have to pay for everything that belongs to asking. So what
steps with asks bring, by what is believed of the guesses they verify, is compared with steps
without, on the clock.
"""

from __future__ import annotations

WEIGHT = 16
"""So many steps count for as much as all that was seen before."""
FEW = 8
"""Steps that say too little."""
RETURN = 8
"""Plans that ask nobody after which little is left of a disappointment: texts change."""
MOST_PLAIN = 8.0
"""A step longer than so many plain ones was held up by something else."""


class Promises:
    """The plans for loads of about as many rows are taken to be kept alike."""

    def __init__(self) -> None:
        self._kept: dict[int, float] = {}
        self._gain: float | None = None
        self._size = 0
        self._steps = 0
        self._brought = self._instead = 0.0
        self.lost_s = 0.0
        """What asking has cost, since the plan, that it did not bring."""

    def kept(self, rows: int) -> float:
        """Which part of what plans for about ``rows`` promise comes true: 1 unless such were slower
        than plain steps."""
        return self._kept.get(rows.bit_length(), 1.0)

    def made(self, rows: int, gain: float | None) -> None:
        """A plan for ``rows`` promises ``gain`` times the tokens of plain steps, or asks nobody."""
        self._settle()
        self._gain, self._size = gain, rows.bit_length()
        if gain is None and self._size in self._kept:
            self._kept[self._size] += (1 - self._kept[self._size]) / RETURN

    def took(self, tokens: float, seconds: float, rows: int, plain_s: float) -> None:
        """A step of ``rows`` with asks brought ``tokens`` in ``seconds``, asking included; without
        it would have taken ``plain_s``."""
        if rows.bit_length() != self._size:
            return  # another load than was planned for
        seconds = min(seconds, MOST_PLAIN * plain_s)
        self._steps += 1
        self._brought += tokens
        self._instead += rows * seconds / plain_s
        self.lost_s = max(0.0, self.lost_s + seconds - tokens * plain_s / rows)

    def _settle(self) -> None:
        if self._gain is not None and self._steps >= FEW:
            gain = self._brought / self._instead
            kept = 1.0 if gain >= 1 else gain / self._gain  # who gains at all is let go on
            before = self._kept.setdefault(self._size, 1.0)
            self._kept[self._size] += (kept - before) * self._steps / (self._steps + WEIGHT)
        self._steps, self._brought, self._instead, self.lost_s = 0, 0.0, 0.0, 0.0
