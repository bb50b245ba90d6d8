"""Which guesses were right: one rule for every drafter, greedy or sampled.

The target draws its own token at every position, with noise that depends on the position alone; a
guess is right when it is that token (drafter-invariant speculative decoding, arXiv 2408.07978). So
what is delivered is what would have been without guesses, whoever made them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence


def verified(drafts: Sequence[int], drawn: Sequence[int], stops: Container[int] = ()) -> int:
    """How many of the ``drawn`` tokens count, at least one: ``drawn[i]`` was drawn behind
    ``drafts[:i]``, so it is the request's next token as long as those were drawn themselves. None
    counts behind one of ``stops``."""
    count = 1
    for draft, token in zip(drafts, drawn, strict=False):
        if draft != token or token in stops:
            break
        count += 1
    return count
