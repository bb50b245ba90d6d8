"""Which guesses were right: one rule for every drafter, greedy or sampled, for chains and trees.

The target draws its own token at every position, with noise that depends on the position alone; a
guess is right when it is that token (drafter-invariant speculative decoding, arXiv 2408.07978). So
what is delivered is what would have been without guesses, whoever made them. In a tree the walk
draws once at each node, never once for each way through it: that would favour what many ways share.
"""

from __future__ import annotations

from collections.abc import Container, Sequence


def verified(
    drafts: Sequence[int],
    drawn: Sequence[int],
    stops: Container[int] = (),
    parents: Sequence[int] | None = None,
    typical: Sequence[bool] = (),
) -> list[int]:
    """The nodes whose draws count, from the root (0) on: ``drawn[0]`` is the request's next token,
    and where guess i, which is node i + 1, is the token drawn at its parent, ``drawn[i + 1]`` comes
    behind it. ``parents`` as in :class:`~loramux.batch.Row`; of children that guess the same the
    first is taken. Nothing counts behind one of ``stops``.

    ``typical[i]``: guess i passes whatever was drawn at its parent, unless it is a stop: an end is
    always drawn. Only then is what is delivered not what was drawn: it is the guesses of the path,
    and behind the last of them what was drawn there."""
    path = [0]
    for guess, token in enumerate(drafts):
        # Children stand behind their parents, so one pass meets all of a path in order.
        parent = guess if parents is None else parents[guess]
        right = token == drawn[parent] or (typical and typical[guess])
        if parent == path[-1] and right and token not in stops:
            path.append(guess + 1)
    return path
