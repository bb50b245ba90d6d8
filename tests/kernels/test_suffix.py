"""The suffix tree against counting in the texts themselves."""

from __future__ import annotations

from collections import Counter

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
    went_on = {s[:-1]: 0 for s in counts}
    for tokens in counts:
        went_on[tokens[:-1]] += 1
    ends = {tuple(text[start:]) for text in texts for start in range(max(0, len(text) - depth + 1), len(text))}
    needed = {s for s in counts if len(s) == depth or s in ends or went_on.get(s, 0) > 1}
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


def searched(
    texts: list[Text], depth: int, context: Text, most: int, least: float, branch: bool
) -> Continuation:
    """``guess`` by definition, from counts; without an order among what is equally frequent."""
    counts = occurrences(texts, depth)
    best = Continuation([], [], 0.0, 0)
    for length in range(1, min(depth - 1, len(context)) + 1):
        start = tuple(context[-length:])
        if not counts[start]:
            break
        chosen: list[tuple[tuple[int, ...], int]] = []
        open_ = [(1.0, start, 0)]
        score = 0.0

        def ways_on(tokens: tuple[int, ...], share: float, parent: int) -> list:
            if len(tokens) == depth:
                return []
            times = {token: counts[(*tokens, token)] for token in range(3)}
            total = sum(times.values())
            found = [
                (share * n / total, (*tokens, token), parent) for token, n in times.items() if n
            ]
            found = [way for way in found if way[0] >= least]
            return found if branch else sorted(found, reverse=True)[:1]

        open_ = ways_on(start, 1.0, 0)
        while open_ and len(chosen) < min(most, length):
            way = max(open_)
            open_.remove(way)
            share, tokens, parent = way
            chosen.append((tokens, parent))
            score += share
            open_ += ways_on(tokens, share, len(chosen))
        if chosen and score >= best.score:
            best = Continuation(
                [tokens[-1] for tokens, _ in chosen], [parent for _, parent in chosen], score, length
            )
    return best


def score_of(
    guess: Continuation, texts: list[Text], depth: int, context: Text
) -> float:
    """The sum of the products of count ratios along each way of the tree."""
    counts = occurrences(texts, depth)
    ways, shares = [tuple(context[len(context) - guess.matched :])], [1.0]
    for token, parent in zip(guess.token_ids, guess.parents, strict=True):
        before = ways[parent]
        ways.append((*before, token))
        total = sum(counts[(*before, other)] for other in range(3))
        shares.append(shares[parent] * counts[ways[-1]] / total)
    assert len(set(ways)) == len(ways), "one way twice"
    return sum(shares[1:])


@settings(deadline=None, max_examples=300)
@given(
    texts=texts,
    context=st.lists(st.integers(0, 2), max_size=8),
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
    guess = tree.guess(of(context), most, factor=1.0, offset=0.0, least=least, branch=branch)
    assert len(guess.token_ids) <= min(most, guess.matched)
    assert score_of(guess, texts, depth, context) == pytest.approx(guess.score)
    if not branch:
        assert guess.parents == list(range(len(guess.parents)))
    assert all(parent <= place for place, parent in enumerate(guess.parents))
