"""The bounds of a step: as configured, and as far as memory goes just now."""

from __future__ import annotations

from dataclasses import dataclass

CALM_STEPS = 64
"""After so many steps without a shortage twice as much is tried again."""


@dataclass(frozen=True)
class Limits:
    """The bounds of a step, and of the wait for a first token."""

    max_num_seqs: int
    max_batch_tokens: int
    fairness_debt_tokens: int
    prefix_caching: bool = True
    first_token_slo_s: float | None = None


class StepRoom:
    """How many ``tokens`` a step may have, and whether guesses may be made for it: fewer, and none,
    for a while after there was no memory for more."""

    def __init__(self, most: int) -> None:
        self.tokens = most
        self.guesses = True
        self._most = most
        self._calm = 0

    def too_large(self, tokens: int) -> None:
        """There was no memory for a step of so many tokens."""
        self.tokens = max(1, min(self.tokens, tokens // 2))
        self._calm = 0

    def no_guesses(self) -> None:
        """There was no memory to guess."""
        self.guesses = False
        self._calm = 0

    def stepped(self) -> None:
        """A step went well."""
        self._calm += 1
        if self._calm >= CALM_STEPS:
            self._calm, self.guesses = 0, True
            self.tokens = min(self._most, 2 * self.tokens)
