"""The one rule by which guesses are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.sampling.verify import verified

Guess = list[int]


def followed(drafts: Sequence[int], continuation: Sequence[int]) -> list[int]:
    """What a target that says ``continuation``, come what may, draws behind each guess."""
    return list(continuation[: len(drafts) + 1])


@given(
    drafts=st.lists(st.integers(0, 2), max_size=6),
    continuation=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_what_counts_is_what_the_target_says_alone(drafts: Guess, continuation: Guess) -> None:
    count = verified(drafts, followed(drafts, continuation))
    assert 1 <= count <= len(drafts) + 1
    assert drafts[: count - 1] == continuation[: count - 1]
    assert count == len(drafts) + 1 or drafts[count - 1] != continuation[count - 1]


@pytest.mark.parametrize(
    ("drafts", "drawn", "count"),
    [
        ([], [5], 1),
        ([5, 9, 5], [5, 9, 5, 7], 2),  # 9 ends it: what is drawn behind it was never asked for
        ([9, 5], [9, 5, 5], 1),
        ([5], [5, 9], 2),
    ],
)
def test_nothing_counts_behind_a_stop(drafts: Guess, drawn: Guess, count: int) -> None:
    assert verified(drafts, drawn, stops=(9,)) == count
