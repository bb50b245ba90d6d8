"""The suffix tree against counting in the texts themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loramux_kernels import suffix
from loramux_kernels.suffix import Continuation, SuffixTree
from loramux_kernels.suffix.cpu import CHAIN, COUNT, NEXT, POSITIONS

Text = list[int]


def of(tokens: Text) -> np.ndarray:
    return np.array(tokens, np.int64)


def occurrences(texts: list[Text], depth: int) -> Counter[tuple[int, ...]]:
    """Every sequence of up to ``depth`` tokens, as often as it occurs."""
    return Counter(
        tuple(text[start : start + length])
        for text in texts
        for start in range(len(text))
        for length in range(1, min(depth, len(text) - start) + 1)
    )


def check(tree: SuffixTree, texts: list[Text], depth: int, alphabet: int = 3) -> None:
    """All counts, those of sequences that do not occur too; and no node that none needs."""
    counts = occurrences(texts, depth)
    assert tree.num_tokens == sum(map(len, texts))
    near = {(*seen, token) for seen in [(), *counts] for token in range(alphabet)}
    for tokens in {*counts, *(t for t in near if len(t) <= depth)}:
        assert tree.count(of(list(tokens))) == counts[tokens], tokens
    nodes = tree._nodes
    in_use = int(np.count_nonzero(nodes[1:, COUNT]))
    free, node = 0, nodes[0, NEXT]
    while node:
        free, node = free + 1, nodes[node, NEXT]
    assert in_use + free == nodes[0, CHAIN]
    went_on = Counter(tokens[:-1] for tokens in counts)
    ends = {
        tuple(text[start:])
        for text in texts
        for start in range(max(0, len(text) - depth + 1), len(text))
    }
    needed = {s for s in counts if len(s) == depth or s in ends or went_on[s] > 1}
    assert in_use == len(needed)


texts = st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=6)


@settings(deadline=None)
@given(texts=texts, depth=st.integers(1, 6), drops=st.integers(0, 6))
@example(texts=[[0], [0], []], depth=1, drops=1)
@example(texts=[[0, 0, 0, 0]], depth=6, drops=1)
def test_counts_are_those_of_the_texts_that_are_left(
    texts: list[Text], depth: int, drops: int
) -> None:
    tree = SuffixTree(depth)
    for text in texts:
        tree.add(of(text))
    check(tree, texts, depth)
    drops = min(drops, len(texts))
    for _ in range(drops):
        tree.drop()
    check(tree, texts[drops:], depth)


@settings(deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8), depth=st.integers(1, 6)
)
def test_a_text_may_come_in_pieces(pieces: list[Text], depth: int) -> None:
    tree = SuffixTree(depth)
    tree.add(of([]))
    text: Text = []
    for piece in pieces:
        tree.extend(of(piece))
        text += piece
        check(tree, [text], depth)


@pytest.mark.parametrize("position", [0, POSITIONS - 150])
def test_texts_come_and_go_for_long_in_arrays_that_are_full(
    monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    """The text's ring turns, positions begin anew, nodes are used again, arrays double."""
    monkeypatch.setattr(suffix, "FEWEST", 8)
    rng = np.random.default_rng(1)
    tree = SuffixTree(5)
    tree._end = position
    kept: list[Text] = []
    for turn in range(60):
        text = rng.integers(0, 3, rng.integers(0, 20)).tolist()
        while kept and sum(map(len, kept)) + len(text) > (30 if turn < 30 else 64):
            tree.drop()
            kept.pop(0)
        tree.add(of(text))
        kept.append(text)
        check(tree, kept, 5)
    assert len(tree._text) == 64
    assert tree._end > POSITIONS or not position


class Searched:
    """Guesses by definition, from the texts' sequences and where they last began."""

    def __init__(self, texts: list[Text], depth: int) -> None:
        self.counts, self.depth = occurrences(texts, depth), depth
        joined = [(text, start) for text in texts for start in range(len(text))]
        self.last = {
            tuple(text[start : start + length]): place
            for place, (text, start) in enumerate(joined)
            for length in range(1, min(depth, len(text) - start) + 1)
        }

    def ways_on(self, tokens: tuple[int, ...], share: float, parent: int) -> list[Any]:
        """(share, where it last began, tokens, the node they follow) of each."""
        if len(tokens) == self.depth:
            return []
        longer = [(*tokens, token) for token in range(3)]
        total = sum(self.counts[way] for way in longer)
        return [
            (share * (self.counts[way] / total), self.last[way], way, parent)
            for way in longer
            if self.counts[way]
        ]

    def from_(self, start: tuple[int, ...], most: int, least: float, branch: bool) -> Continuation:
        chosen: list[Any] = []
        open_ = self.ways_on(start, 1.0, 0)
        while open_ and len(chosen) < min(most, len(start)):
            share, _, tokens, parent = way = max(open_)
            if share < least:
                break
            chosen.append(way)
            open_ = [other for other in open_ if other is not way] if branch else []
            open_ += self.ways_on(tokens, share, len(chosen))
        score = 0.0
        for way in chosen:
            score += way[0]
        return Continuation(
            [way[2][-1] for way in chosen], [way[3] for way in chosen], score, len(start)
        )

    def guess(self, context: Text, most: int, least: float, branch: bool) -> Continuation:
        best = Continuation([], [], 0.0, 0)
        for length in range(1, min(self.depth - 1, len(context)) + 1):
            found = self.from_(tuple(context[-length:]), most, least, branch)
            if found.token_ids and found.score >= best.score:
                best = found
        return best


@settings(deadline=None, max_examples=200)
@given(
    texts=texts,
    context=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    depth=st.integers(2, 6),
    most=st.integers(1, 7),
    least=st.sampled_from([0.1, 0.3, 0.6]),
    branch=st.booleans(),
)
def test_a_guess_is_what_followed_most_often(
    texts: list[Text], context: Text, depth: int, most: int, least: float, branch: bool
) -> None:
    tree = SuffixTree(depth)
    for text in texts:
        tree.add(of(text))
    while True:
        guess = tree.guess(of(context), most, factor=1.0, offset=0.0, least=least, branch=branch)
        assert guess == Searched(texts, depth).guess(context, most, least, branch)
        assert branch or guess.parents == list(range(len(guess.parents)))
        assert all(parent <= place for place, parent in enumerate(guess.parents))
        if not texts:
            break
        tree.drop()  # what was most frequent need not be so any more
        texts = texts[1:]


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (0.5, 0.0), (2.0, -1.0), (0.0, 3.0)])
def test_longer_matches_may_be_continued_further(
    factor: float, offset: float, branch: bool
) -> None:
    tree = SuffixTree(12)
    tree.add(of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    for matched in range(1, 5):
        guess = tree.guess(
            of([0, *range(1, matched + 1)]),
            4,
            factor=factor,
            offset=offset,
            least=0.1,
            branch=branch,
        )
        budget = min(4, max(int(factor * length + offset) for length in range(1, matched + 1)))
        assert guess.token_ids == list(range(matched + 1, matched + 1 + budget))


def test_what_was_written_last_wins_among_equals() -> None:
    tree = SuffixTree(4)
    for next_ in (5, 6):
        tree.add(of([1, next_]))
        guess = tree.guess(of([1]), 1, factor=1.0, offset=0.0, least=0.1, branch=False)
        assert guess.token_ids == [next_]
