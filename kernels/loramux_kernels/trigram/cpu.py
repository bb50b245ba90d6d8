"""The table and the search of ``loramux_kernels.trigram`` (numba).

The table is made of sets of ``WAYS`` rows, as a processor's cache is: a pair of tokens has its row
in the one set that its hash names, and when all rows there are taken, that which was learned from
the longest ago gives way. A row's successors stand in order of weight, the heaviest first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loramux_kernels.jit import entry, inner

Wide: Any = np.int64  # numba infers exact types, mypy cannot follow numpy's mixtures

WAYS = 8
"""A set's pairs fill a cache line."""
SUCCESSORS = 12
_TABLE = "int64[::1], int64[::1], int32[:,::1], float32[:,::1]"
# Of a search's nodes, side by side: a node's children are neighbours.
_VISITS, _PARENT, _TOKEN, _DEPTH, _ROW, _FIRST, _NUM, _PLACE = range(8)
_REWARD, _WEIGHT, _PRIOR, _MEAN, _BONUS = range(5)


@inner
def _pair(a: int, b: int) -> Any:
    """Never 0, which is an empty row's."""
    return (Wide(a) << 32 | Wide(b)) + 1


@inner
def _set(pairs: Any, pair: int) -> Any:
    """The first row of a pair's set."""
    mixed = np.uint64(pair) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    sets = np.uint64(len(pairs) // WAYS)
    return Wide((mixed >> np.uint64(32)) & (sets - np.uint64(1))) * WAYS


@inner
def _row(pairs: Any, a: int, b: int) -> Any:
    """Where ``a``, ``b`` stand; -1: nowhere."""
    pair = _pair(a, b)
    first = _set(pairs, pair)
    for row in range(first, first + WAYS):
        if pairs[row] == pair:
            return Wide(row)
    return Wide(-1)


@inner
def _room(pairs: Any, learned: Any, pair: int) -> Any:
    """The row for a ``pair`` that has none: an empty one, or the one that gives way."""
    first = _set(pairs, pair)
    oldest = Wide(first)
    for row in range(first, first + WAYS):
        if pairs[row] == 0:
            return Wide(row)
        if learned[row] < learned[oldest]:
            oldest = Wide(row)
    return oldest


@inner
def _count(tokens: Any, weights: Any, row: int, token: int, more: float, cap: float) -> None:
    """``token`` stood there once more. A thirteenth takes the place of the lightest."""
    place = 0
    while place < SUCCESSORS - 1 and weights[row, place] > 0 and tokens[row, place] != token:
        place += 1
    weight = more
    if tokens[row, place] == token:
        weight += weights[row, place]
    weight = min(weight, cap)
    while place > 0 and weights[row, place - 1] <= weight:
        tokens[row, place], weights[row, place] = tokens[row, place - 1], weights[row, place - 1]
        place -= 1
    tokens[row, place], weights[row, place] = token, weight


@entry(f"int64({_TABLE}, int64[::1], int64, float64, float64)")
def learn(
    pairs: Any,
    learned: Any,
    tokens: Any,
    weights: Any,
    ids: Any,
    now: int,
    more: float,
    cap: float,
) -> int:
    """Every three of ``ids`` in a row: the third's weight behind the first two grows by ``more``,
    up to ``cap``. ``now`` counts tokens. How many rows were empty before."""
    filled = 0
    for at in range(2, len(ids)):
        row = _row(pairs, ids[at - 2], ids[at - 1])
        if row < 0:
            pair = _pair(ids[at - 2], ids[at - 1])
            row = _room(pairs, learned, pair)
            filled += pairs[row] == 0
            pairs[row] = pair
            tokens[row] = 0
            weights[row] = 0
        learned[row] = now + at
        _count(tokens, weights, row, ids[at], more, cap)
    return filled


@entry(f"int64({_TABLE}, {_TABLE})")
def move(
    pairs: Any,
    learned: Any,
    tokens: Any,
    weights: Any,
    to_pairs: Any,
    to_learned: Any,
    to_tokens: Any,
    to_weights: Any,
) -> int:
    """All rows into an empty table with more of them. How many it then has."""
    filled = 0
    for row in range(len(pairs)):
        if pairs[row] != 0:
            to = _room(to_pairs, to_learned, pairs[row])
            filled += to_pairs[to] == 0
            to_pairs[to], to_learned[to] = pairs[row], learned[row]
            to_tokens[to], to_weights[to] = tokens[row], weights[row]
    return filled


@inner
def _expand(
    pairs: Any, tokens: Any, weights: Any, tree: Any, values: Any, num: int, node: int
) -> Any:
    """All that may follow ``node`` become its children; how many nodes there are then."""
    parent = tree[_PARENT, node]
    row = _row(pairs, tree[_TOKEN, parent], tree[_TOKEN, node])
    tree[_ROW, node] = row
    if row < 0:
        return num
    total = 0.0
    for place in range(SUCCESSORS):
        total += weights[row, place]
    tree[_FIRST, node] = num
    place = 0
    while place < SUCCESSORS and weights[row, place] > 0:
        tree[_VISITS, num] = 0
        tree[_PARENT, num] = node
        tree[_TOKEN, num] = tokens[row, place]
        tree[_DEPTH, num] = tree[_DEPTH, node] + 1
        tree[_NUM, num] = 0
        tree[_ROW, num] = -1
        values[_REWARD, num] = 0.0
        values[_WEIGHT, num] = values[_WEIGHT, node] + weights[row, place]
        values[_PRIOR, num] = weights[row, place] / total
        values[_MEAN, num] = np.inf
        values[_BONUS, num] = 0.0
        num += 1
        place += 1
    tree[_NUM, node] = place
    return num


@inner
def _select(tree: Any, values: Any, node: int, c1: float, c2: float) -> Any:
    """The child to visit next: the heaviest that was never visited, else by PUCT."""
    visits = tree[_VISITS, node]
    scale = (c1 + math.log((visits + c2 + 1.0) / c2)) * math.sqrt(visits)
    first = Wide(tree[_FIRST, node])
    chosen, best = first, -1.0
    for child in range(first, first + tree[_NUM, node]):
        score = values[_MEAN, child] + scale * values[_BONUS, child]
        if score > best:
            chosen, best = Wide(child), score
    return chosen


@inner
def _visit(tree: Any, values: Any, node: int, reward: float) -> None:
    tree[_VISITS, node] += 1
    values[_REWARD, node] += reward
    visits = tree[_VISITS, node]
    values[_MEAN, node] = values[_REWARD, node] / visits
    values[_BONUS, node] = values[_PRIOR, node] / (1 + visits)


@inner
def _random(state: Any) -> Any:
    """Uniform in [0, 1): xorshift64*."""
    state ^= state >> np.uint64(12)
    state ^= state << np.uint64(25)
    state ^= state >> np.uint64(27)
    return state, float((state * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * 2.0**-53


@inner
def _play(
    pairs: Any, tokens: Any, weights: Any, tree: Any, node: int, deepest: int, state: Any
) -> Any:
    """Go on from ``node`` at random, as the weights have it; the sum of the weights met."""
    met = 0.0
    b = tree[_TOKEN, node]
    row = Wide(tree[_ROW, node])
    for _ in range(tree[_DEPTH, node], deepest):
        if row < 0:
            break
        total = 0.0
        for place in range(SUCCESSORS):
            total += weights[row, place]
        state, uniform = _random(state)
        left, place = uniform * total, 0
        while (
            place < SUCCESSORS - 1 and weights[row, place + 1] > 0 and left >= weights[row, place]
        ):
            left -= weights[row, place]
            place += 1
        met += weights[row, place]
        before, b = b, tokens[row, place]
        row = _row(pairs, before, b)
    return met, state


@inner
def _most_visited(
    tree: Any, values: Any, branch: bool, open_: Any, answer: Any, visits: Any
) -> Any:
    """The nodes below the root by their visits, each behind its parent, into ``answer``. A line of
    them unless ``branch``."""
    num, ways, node, weight = 0, 0, Wide(1), 0.0
    tree[_PLACE, node] = 0
    while num < answer.shape[1]:
        if not branch:
            ways = 0
        first = tree[_FIRST, node]
        for child in range(first, first + tree[_NUM, node]):
            if tree[_VISITS, child] > 0:
                open_[ways] = child
                ways += 1
        if ways == 0:
            break
        next_ = 0
        for way in range(1, ways):
            if tree[_VISITS, open_[way]] > tree[_VISITS, open_[next_]]:
                next_ = way
        node = Wide(open_[next_])
        ways -= 1
        for way in range(next_, ways):
            open_[way] = open_[way + 1]
        answer[0, num], answer[1, num] = tree[_TOKEN, node], tree[_PLACE, tree[_PARENT, node]]
        visits[num] = tree[_VISITS, node]
        if num == 0:
            weight = values[_WEIGHT, node]
        num += 1
        tree[_PLACE, node] = num
    return num, weight


@entry(
    f"Tuple((int64, float64))({_TABLE}, int64, int64, int64, int64, float64, float64, uint64,"
    " boolean, int64[:,::1], int64[::1])"
)
def search(
    pairs: Any,
    learned: Any,
    tokens: Any,
    weights: Any,
    a: int,
    b: int,
    iterations: int,
    deepest: int,
    c1: float,
    c2: float,
    seed: Any,
    branch: bool,
    answer: Any,
    visits: Any,
) -> Any:
    """What may follow ``a``, ``b`` (see ``TrigramTable.search``): tokens and parents into
    ``answer`` [2, most], how often each was visited into ``visits``; how many there are, and the
    weight of the first."""
    if _row(pairs, a, b) < 0:
        return 0, 0.0
    size = 2 + iterations * SUCCESSORS
    tree, values = np.empty((8, size), np.int32), np.empty((5, size), np.float64)
    tree[:, :2] = 0
    values[:, :2] = 0.0
    # Node 0 is what stands before the root, 1.
    tree[_TOKEN, 0], tree[_TOKEN, 1] = a, b
    num, state = 2, seed
    for _ in range(iterations):
        node = Wide(1)
        while tree[_NUM, node] > 0:
            node = Wide(_select(tree, values, node, c1, c2))
        if tree[_VISITS, node] == 0 and tree[_DEPTH, node] < deepest:
            num = _expand(pairs, tokens, weights, tree, values, num, node)
        met, state = _play(pairs, tokens, weights, tree, node, deepest, state)
        reward = 1.0 + values[_WEIGHT, node] + met
        while node != 0:
            _visit(tree, values, node, reward)
            node = Wide(tree[_PARENT, node])
    open_ = np.empty(size, np.int64)
    return _most_visited(tree, values, branch, open_, answer, visits)
