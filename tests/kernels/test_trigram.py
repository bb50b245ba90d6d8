"""The table of tri-grams against a dictionary, and what the search over it must always give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loramux_kernels import trigram
from loramux_kernels.trigram import TrigramTable

SEARCH: dict[str, Any] = {
    "iterations": 150,
    "depth": 4,
    "c1": 32.0,
    "c2": 8.0,
    "seed": 7,
}


def table_of(*texts: list[int], most_rows: int = 1 << 10) -> TrigramTable:
    table = TrigramTable(most_rows)
    for text in texts:
        table.learn(np.array(text, np.int64), more=0.04, cap=3.0)
    return table


def weights(texts: list[list[int]]) -> dict[tuple[int, int], dict[int, float]]:
    """Without a limit on successors."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for text in texts:
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            of = found.setdefault((a, b), {})
            of[c] = min(3.0, of.pop(c, 0.0) + 0.04)  # the latest stands last
    return found


@settings(deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 3), max_size=300), max_size=3))
@example(texts=[[0] * 300])
def test_a_weight_grows_by_its_step_up_to_the_cap(texts: list[list[int]]) -> None:
    table, expected = table_of(*texts), weights(texts)
    for a in range(4):
        for b in range(4):
            found = table.successors(a, b)
            assert found == pytest.approx(expected.get((a, b), {}))
            order = list(reversed(expected.get((a, b), {}).items()))
            order.sort(key=lambda entry: -round(entry[1], 3))
            if all(weight < 2.99 for _, weight in order):
                assert list(found) == [token for token, _ in order], "of equals the latest first"


def test_a_thirteenth_successor_takes_the_place_of_the_lightest() -> None:
    text: list[int] = []
    for token in range(10, 22):
        text += [1, 2, token]
    table = table_of(text, [1, 2, 10])
    assert list(table.successors(1, 2)) == [10, *range(21, 10, -1)]
    table.learn(np.array([1, 2, 99], np.int64), more=0.04, cap=3.0)
    assert list(table.successors(1, 2)) == [10, 99, *range(21, 11, -1)]


def test_more_pairs_are_given_more_rows_and_little_is_lost_by_it() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 60, 4000).tolist()
    table = table_of(*(text[at : at + 52] for at in range(0, 4000, 50)), most_rows=1 << 16)
    assert len(table._arrays[0]) == 8192
    expected = weights([text[at : at + 52] for at in range(0, 4000, 50)])
    lost = [pair for pair, of in expected.items() if table.successors(*pair) != pytest.approx(of)]
    # With four pairs a set on average, one set in fifty is wanted by more than its eight ways.
    assert len(lost) <= 0.02 * len(expected)
    assert table._filled == np.count_nonzero(table._arrays[0])


def test_of_more_pairs_than_there_are_rows_for_the_latest_stay() -> None:
    table = TrigramTable(64)
    for first in range(0, 3000, 3):
        table.learn(np.array([first, first + 1, first + 2], np.int64), more=0.04, cap=3.0)
    assert len(table._arrays[0]) == 64
    known = [first for first in range(0, 3000, 3) if table.successors(first, first + 1)]
    assert len(known) == 64
    assert known[0] >= 3000 - 3 * 64 * 3 and 2997 in known


def test_an_unknown_pair_has_no_answer() -> None:
    table = table_of([1, 2, 3])
    assert table.search(2, 3, 5, branch=True, **SEARCH).token_ids == []
    assert table.search(1, 2, 5, branch=True, **SEARCH).token_ids == [3]


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.integers(0, 5), min_size=3, max_size=200),
    most=st.integers(1, 64),
    iterations=st.integers(1, 150),
    depth=st.integers(1, 4),
)
def test_a_search_gives_the_most_visited_beginning_of_its_tree(
    text: list[int], most: int, iterations: int, depth: int
) -> None:
    table, known = table_of(text), weights([text])
    knobs = {**SEARCH, "iterations": iterations, "depth": depth}
    whole = table.search(*text[:2], 2 + 12 * 150, branch=True, **knobs)
    assert whole == table.search(*text[:2], 2 + 12 * 150, branch=True, **knobs)
    ways, below = [tuple(text[:2])], [0] * (len(whole.visits) + 1)
    for token, parent, visits in zip(whole.token_ids, whole.parents, whole.visits, strict=True):
        assert token in known[ways[parent][-2:]]  # only what was seen there
        ways.append((*ways[parent], token))
        below[parent] += visits
    assert len(set(ways)) == len(ways)
    assert max(len(way) for way in ways) <= 2 + depth
    assert whole.visits == sorted(whole.visits, reverse=True)
    # A visit ends at a node or goes on below it; at one that may have children only the first ends.
    for way, visits, passed in zip(ways, [iterations, *whole.visits], below, strict=True):
        if len(way) < 2 + depth and way[-2:] in known:
            assert passed == visits - 1
        else:
            assert passed == 0
    cut = table.search(*text[:2], most, branch=True, **knobs)
    assert cut.token_ids == whole.token_ids[:most] and cut.parents == whole.parents[:most]
    line = table.search(*text[:2], most, branch=False, **knobs)
    at = 0
    for token, visits in zip(line.token_ids, line.visits, strict=True):
        children = [node for node, parent in enumerate(whole.parents, 1) if parent == at]
        at = children[0]
        assert (token, visits) == (whole.token_ids[at - 1], whole.visits[at - 1])
    assert line.parents == list(range(len(line.parents)))


def test_the_search_follows_the_weights() -> None:
    table = table_of([1, 2, 3], *[[1, 2, 4, 5, 6, 7, 8]] * 9)
    found = table.search(1, 2, 3, branch=True, **SEARCH)
    assert found.token_ids == [4, 5, 6] and found.parents == [0, 1, 2]
    assert found.weight == pytest.approx(0.36)
    assert found.visits[0] == pytest.approx(0.9 * 150, abs=8)


def test_rows_double_at_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigram, "FEWEST_ROWS", 8)
    table = table_of([1, 2, 3, 4])
    assert len(table._arrays[0]) == 8
    before = table.num_bytes
    table.learn(np.array([4, 5, 6], np.int64), more=0.04, cap=3.0)
    assert table.num_bytes == 2 * before
    assert table.successors(1, 2) == pytest.approx({3: 0.04})
