"""Lookup against a search that tries every place."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from loramux.request import Request, SamplingParams
from loramux.speculation.drafter import Ask
from loramux.speculation.lookup import Lookup


def proposed(drafter: Lookup, ids: list[int], most: int) -> list[int]:
    request = Request("r", prompt_ids=ids, sampling=SamplingParams(seed=0, max_tokens=64))
    return list(drafter.propose([Ask(request, most)])[0].token_ids)


def searched(drafter: Lookup, ids: list[int], most: int) -> list[int]:
    """The same by definition: the longest length first, then the place."""
    for length in range(min(drafter.longest, len(ids) - 1), drafter.shortest - 1, -1):
        ends = [
            end
            for end in range(length, len(ids))
            if ids[end - length : end] == ids[len(ids) - length :]
        ]
        if ends:
            copied = list(ids)
            for at in range(most):
                copied.append(copied[ends[0 if drafter.first else -1] + at])
            return copied[len(ids) :]
    return []


@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    shortest=st.integers(1, 4),
    more=st.integers(0, 4),
    first=st.booleans(),
    most=st.integers(1, 9),
)
@example(ids=[1], shortest=1, more=0, first=False, most=3)
@example(ids=[1, 1], shortest=1, more=3, first=False, most=3)
@example(ids=[2, 1, 2, 1], shortest=2, more=0, first=True, most=5)
def test_what_followed_the_longest_match_is_proposed(
    ids: list[int], shortest: int, more: int, first: bool, most: int
) -> None:
    drafter = Lookup(shortest=shortest, longest=shortest + more, first=first)
    assert proposed(drafter, ids, most) == searched(drafter, ids, most)
