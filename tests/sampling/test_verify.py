"""The one rule by which guesses are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trees import way_to

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
    nodes = verified(drafts, followed(drafts, continuation))
    count = len(nodes)
    assert nodes == list(range(count))
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
    assert verified(drafts, drawn, stops=(9,)) == list(range(count))
    assert verified(drafts, drawn, (9,), range(len(drafts))) == list(range(count))


@given(data=st.data())
def test_in_a_tree_too(data: st.DataObject) -> None:
    """The target says one thing after each text it knows of; the walk says what it says alone."""
    drafts = data.draw(st.lists(st.integers(0, 2), max_size=9))
    parents = [data.draw(st.integers(0, node)) for node in range(len(drafts))]
    ways = [way_to(parents, node) for node in range(len(drafts) + 1)]
    texts = [tuple(drafts[node - 1] for node in way[1:]) for way in ways]
    says = {text: data.draw(st.integers(0, 3)) for text in texts}
    nodes = verified(drafts, [says[text] for text in texts], (2,), parents)
    alone: list[int] = []
    while 2 not in alone and tuple(alone) in says:
        alone.append(says[tuple(alone)])
    drawn = [says[texts[node]] for node in nodes]
    assert ways[nodes[-1]] == nodes
    assert drawn == alone[: len(drawn)]
    # It may stop early only where equal siblings hide each other's children.
    if len(set(texts)) == len(texts):
        assert drawn == alone


def test_the_first_of_equal_children_is_taken() -> None:
    assert verified([7, 7, 5, 5], [7, 5, 5, 6, 6], parents=[0, 0, 1, 2]) == [0, 1, 3]
    assert verified([4, 7, 7], [7, 0, 8, 9], parents=[0, 0, 0]) == [0, 2]


@given(data=st.data())
def test_what_is_typical_passes_too(data: st.DataObject) -> None:
    """By definition: from the root on, the first child that is typical or drawn, never a stop."""
    drafts = data.draw(st.lists(st.integers(0, 2), max_size=8))
    parents = [data.draw(st.integers(0, node)) for node in range(len(drafts))]
    drawn = [data.draw(st.integers(0, 3)) for _ in range(len(drafts) + 1)]
    passes = [data.draw(st.booleans()) for _ in drafts]
    way = [0]
    while True:
        children = [
            guess + 1
            for guess, parent in enumerate(parents)
            if parent == way[-1]
            and drafts[guess] != 2
            and (passes[guess] or drafts[guess] == drawn[parent])
        ]
        if not children:
            break
        way.append(children[0])
    assert verified(drafts, drawn, (2,), parents, passes) == way
    none = [False] * len(drafts)
    assert verified(drafts, drawn, (2,), parents, none) == verified(drafts, drawn, (2,), parents)
