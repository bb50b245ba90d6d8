"""The tree of ``loramux_kernels.suffix`` (numba).

A node stands for the tokens from the root down to it, DEPTH of them, which occurred COUNT times, of
which ENDS times a text ended there. AT is where they last began: a node's tokens are read from the
text there, so edges have no text of their own, and since texts leave in the order in which they
came, what a node refers to stays as long as the node. The tokens inside an edge occurred as often
as all of it.

A node's children are a list (FIRST, then NEXT and PREVIOUS); a child is found in HEADS, hash chains
over (PARENT, TOKEN), its first token. BEST is its most frequent child, 0 when that must be looked
for again. 0 is the root, which is nobody's child: its NEXT heads the list of free nodes and its
CHAIN counts the nodes ever used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loramux_kernels.jit import entry, inner

Wide: Any = np.int64  # numba infers exact types, mypy cannot follow numpy's mixtures

FIELDS = 11
PARENT, TOKEN, DEPTH, COUNT, ENDS, AT, BEST, FIRST, NEXT, PREVIOUS, CHAIN = range(FIELDS)
POSITIONS = (1 << 31) - 1
"""Positions in the text begin anew behind it. A text's length is a power of two."""
_TREE = "int32[:,::1], int32[::1], int32[::1]"


@inner
def _bucket(heads: Any, parent: int, token: int) -> Any:
    mixed = (np.uint64(parent) << np.uint64(32)) ^ np.uint64(token)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return Wide((mixed >> np.uint64(32)) & np.uint64(len(heads) - 1))


@inner
def _child(nodes: Any, heads: Any, parent: int, token: int) -> Any:
    node = heads[_bucket(heads, parent, token)]
    while node != 0 and (nodes[node, PARENT] != parent or nodes[node, TOKEN] != token):
        node = nodes[node, CHAIN]
    return node


@inner
def _find_from(nodes: Any, heads: Any, node: int) -> None:
    bucket = _bucket(heads, nodes[node, PARENT], nodes[node, TOKEN])
    nodes[node, CHAIN] = heads[bucket]
    heads[bucket] = node


@inner
def _lose(nodes: Any, heads: Any, node: int) -> None:
    """``node`` is not found any more."""
    bucket = _bucket(heads, nodes[node, PARENT], nodes[node, TOKEN])
    before = heads[bucket]
    if before == node:
        heads[bucket] = nodes[node, CHAIN]
        return
    while nodes[before, CHAIN] != node:
        before = nodes[before, CHAIN]
    nodes[before, CHAIN] = nodes[node, CHAIN]


@inner
def _new(nodes: Any, parent: int, token: int, depth: int) -> Any:
    node = nodes[0, NEXT]
    if node != 0:
        nodes[0, NEXT] = nodes[node, NEXT]
    else:
        nodes[0, CHAIN] += 1
        node = nodes[0, CHAIN]
    for column in range(FIELDS):
        nodes[node, column] = 0
    nodes[node, PARENT] = parent
    nodes[node, TOKEN] = token
    nodes[node, DEPTH] = depth
    return node


@inner
def _free(nodes: Any, node: int) -> None:
    nodes[node, COUNT] = 0
    nodes[node, NEXT] = nodes[0, NEXT]
    nodes[0, NEXT] = node


@inner
def _join(nodes: Any, heads: Any, node: int) -> None:
    """``node`` becomes the first of its parent's children."""
    parent = nodes[node, PARENT]
    first = nodes[parent, FIRST]
    nodes[node, NEXT] = first
    nodes[node, PREVIOUS] = 0
    if first != 0:
        nodes[first, PREVIOUS] = node
    nodes[parent, FIRST] = node
    _find_from(nodes, heads, node)


@inner
def _leave(nodes: Any, heads: Any, node: int) -> None:
    """``node`` is no longer among its parent's children."""
    _lose(nodes, heads, node)
    parent, after, before = nodes[node, PARENT], nodes[node, NEXT], nodes[node, PREVIOUS]
    if after != 0:
        nodes[after, PREVIOUS] = before
    if before != 0:
        nodes[before, NEXT] = after
    else:
        nodes[parent, FIRST] = after
    if nodes[parent, BEST] == node:
        nodes[parent, BEST] = 0


@inner
def _split(nodes: Any, heads: Any, text: Any, node: int, depth: int) -> Any:
    """A node of ``depth`` on the edge down to ``node``, which becomes its child."""
    upper = _new(nodes, nodes[node, PARENT], nodes[node, TOKEN], depth)
    was_best = nodes[nodes[node, PARENT], BEST] == node
    _leave(nodes, heads, node)
    nodes[upper, COUNT] = nodes[node, COUNT]
    nodes[upper, AT] = nodes[node, AT]
    _join(nodes, heads, upper)
    if was_best:
        nodes[nodes[upper, PARENT], BEST] = upper
    nodes[node, PARENT] = upper
    nodes[node, TOKEN] = text[(Wide(nodes[node, AT]) + depth) & (len(text) - 1)]
    _join(nodes, heads, node)
    nodes[upper, BEST] = node
    return upper


@inner
def _merge(nodes: Any, heads: Any, node: int) -> None:
    """The edge to ``node`` and that to its only child become one."""
    only = nodes[node, FIRST]
    was_best = nodes[nodes[node, PARENT], BEST] == node
    _leave(nodes, heads, only)
    _leave(nodes, heads, node)
    nodes[only, PARENT] = nodes[node, PARENT]
    nodes[only, TOKEN] = nodes[node, TOKEN]
    _join(nodes, heads, only)
    if was_best:
        nodes[nodes[only, PARENT], BEST] = only
    _free(nodes, node)


@inner
def _insert(nodes: Any, heads: Any, text: Any, start: int, length: int, ends: int) -> None:
    """Count the ``length`` tokens at ``start`` and all that they begin with."""
    mask = len(text) - 1
    node, depth = Wide(0), Wide(0)
    while depth < length:
        token = text[(start + depth) & mask]
        below = Wide(_child(nodes, heads, node, token))
        if below == 0:
            below = Wide(_new(nodes, node, token, length))
            _join(nodes, heads, below)
            depth = Wide(length)
        else:
            there, bottom = Wide(nodes[below, AT]), Wide(nodes[below, DEPTH])
            stop = min(bottom, length)
            depth += 1
            while depth < stop and text[(there + depth) & mask] == text[(start + depth) & mask]:
                depth += 1
            if depth < bottom:
                below = Wide(_split(nodes, heads, text, below, depth))
        nodes[below, COUNT] += 1
        nodes[below, AT] = start & POSITIONS
        best = nodes[node, BEST]
        if best != 0 and nodes[below, COUNT] >= nodes[best, COUNT]:
            nodes[node, BEST] = below
        node = below
    nodes[node, ENDS] += ends


@inner
def _remove(nodes: Any, heads: Any, text: Any, start: int, length: int, ends: int) -> None:
    """Undo ``_insert``."""
    mask = len(text) - 1
    node, depth = Wide(0), Wide(0)
    while depth < length:
        below = Wide(_child(nodes, heads, node, text[(start + depth) & mask]))
        nodes[below, COUNT] -= 1
        if nodes[node, BEST] == below:
            nodes[node, BEST] = 0
        node, depth = below, Wide(nodes[below, DEPTH])
    nodes[node, ENDS] -= ends
    if nodes[node, COUNT] == 0:
        parent = Wide(nodes[node, PARENT])
        _leave(nodes, heads, node)
        _free(nodes, node)
        node = parent
    first = nodes[node, FIRST]
    if node != 0 and nodes[node, ENDS] == 0 and first != 0 and nodes[first, NEXT] == 0:
        _merge(nodes, heads, node)


@entry(f"void({_TREE}, int64, int64, int64[::1], int64)")
def extend(
    nodes: Any, heads: Any, text: Any, start: int, end: int, tokens: Any, deepest: int
) -> None:
    """The text from ``start`` to ``end`` goes on by ``tokens``. Its last suffixes grow: they are
    taken out and come back longer."""
    more, mask = len(tokens), len(text) - 1
    for at in range(more):
        text[(end + at) & mask] = tokens[at]
    growing = max(start, end - deepest + 1)
    for at in range(growing, end):
        _remove(nodes, heads, text, at, end - at, 1)
    for at in range(growing, end + more):
        left = end + more - at
        _insert(nodes, heads, text, at, min(left, deepest), int(left < deepest))


@entry(f"void({_TREE}, int64, int64, int64)")
def forget(nodes: Any, heads: Any, text: Any, start: int, end: int, deepest: int) -> None:
    """Take out the text from ``start`` to ``end``."""
    for at in range(start, end):
        _remove(nodes, heads, text, at, min(end - at, deepest), int(end - at < deepest))


@entry("void(int32[:,::1], int32[::1])")
def find_again(nodes: Any, heads: Any) -> None:
    """Fill new ``heads``, all 0."""
    for node in range(1, nodes[0, CHAIN] + 1):
        if nodes[node, COUNT] > 0:
            _find_from(nodes, heads, node)


@inner
def _walk(nodes: Any, heads: Any, text: Any, tokens: Any, first: int) -> Any:
    """The node at which ``tokens[first:]`` end or which is the next below; 0: nowhere."""
    mask = len(text) - 1
    length = len(tokens) - first
    node, depth = Wide(0), Wide(0)
    while depth < length:
        node = Wide(_child(nodes, heads, node, tokens[first + depth]))
        if node == 0:
            return node
        there, stop = Wide(nodes[node, AT]), min(Wide(nodes[node, DEPTH]), length)
        depth += 1
        while depth < stop:
            if text[(there + depth) & mask] != tokens[first + depth]:
                return Wide(0)
            depth += 1
    return node


@entry(f"int64({_TREE}, int64[::1])")
def count(nodes: Any, heads: Any, text: Any, tokens: Any) -> int:
    """How often ``tokens``, one at least and no more than the tree is deep, occur."""
    return int(nodes[_walk(nodes, heads, text, tokens, 0), COUNT])


@inner
def _best(nodes: Any, text: Any, oldest: int, node: int) -> Any:
    """The most frequent child; of equally frequent ones, that which occurred last."""
    if nodes[node, BEST] == 0:
        mask = len(text) - 1
        most, latest = Wide(0), Wide(0)
        child = nodes[node, FIRST]
        while child != 0:
            times, when = nodes[child, COUNT], (Wide(nodes[child, AT]) - oldest) & mask
            if times > most or (times == most and when > latest):
                nodes[node, BEST], most, latest = child, times, when
            child = nodes[child, NEXT]
    return Wide(nodes[node, BEST])


@inner
def _share(nodes: Any, node: int, child: int) -> float:
    """Of the times that what ``node`` stands for went on: how often to ``child``."""
    return float(nodes[child, COUNT] / (nodes[node, COUNT] - nodes[node, ENDS]))


@inner
def _line(
    nodes: Any,
    text: Any,
    oldest: int,
    node: int,
    depth: int,
    budget: int,
    least: float,
    tokens: Any,
    parents: Any,
) -> Any:
    """Always on to the most frequent child: how many tokens, and the sum of their shares."""
    mask = len(text) - 1
    share, score, num = 1.0, 0.0, 0
    while num < budget:
        if depth == nodes[node, DEPTH]:
            below = _best(nodes, text, oldest, node)
            if below == 0:
                break
            share *= _share(nodes, node, below)
            if share < least:
                break
            node = below
        tokens[num] = text[(Wide(nodes[node, AT]) + depth) & mask]
        parents[num] = num
        score += share
        num += 1
        depth += 1
    return num, score


@inner
def _open(
    nodes: Any,
    node: int,
    depth: int,
    parent: int,
    share: float,
    least: float,
    edges: Any,
    shares: Any,
    num: int,
) -> Any:
    """Add the ways on from ``depth`` tokens down to ``node`` to the ``num`` ways there are."""
    if depth < nodes[node, DEPTH]:
        edges[num, 0], edges[num, 1], edges[num, 2], shares[num] = node, depth, parent, share
        return num + 1
    child = nodes[node, FIRST]
    while child != 0:
        part = share * _share(nodes, node, child)
        if part >= least and num < len(shares):
            edges[num, 0], edges[num, 1], edges[num, 2], shares[num] = child, depth, parent, part
            num += 1
        child = nodes[child, NEXT]
    return num


@inner
def _branches(
    nodes: Any,
    text: Any,
    oldest: int,
    node: int,
    depth: int,
    budget: int,
    least: float,
    tokens: Any,
    parents: Any,
    edges: Any,
    shares: Any,
) -> Any:
    """Always the likeliest way on of all that are open, the latest of equal ones: how many tokens,
    and the sum of their shares."""
    mask = len(text) - 1
    open_ = _open(nodes, node, depth, 0, 1.0, least, edges, shares, 0)
    score, num = 0.0, 0
    while num < budget and open_ > 0:
        next_, latest = 0, Wide(-1)
        for way in range(open_):
            when = (Wide(nodes[edges[way, 0], AT]) - oldest) & mask
            if shares[way] > shares[next_] or (shares[way] == shares[next_] and when > latest):
                next_, latest = way, when
        below, depth, share = Wide(edges[next_, 0]), Wide(edges[next_, 1]), shares[next_]
        tokens[num] = text[(Wide(nodes[below, AT]) + depth) & mask]
        parents[num] = edges[next_, 2]
        score += share
        num += 1
        open_ -= 1
        for column in range(3):
            edges[next_, column] = edges[open_, column]
        shares[next_] = shares[open_]
        open_ = _open(nodes, below, depth + 1, num, share, least, edges, shares, open_)
    return num, score


@entry(
    f"Tuple((int64, float64, int64))({_TREE}, int64, int64[::1], float64, float64, float64,"
    " boolean, int64[:,::1])"
)
def guess(
    nodes: Any,
    heads: Any,
    text: Any,
    oldest: int,
    context: Any,
    factor: float,
    offset: float,
    least: float,
    branch: bool,
    answer: Any,
) -> Any:
    """The best continuation of ``context`` (see ``SuffixTree.guess``) into ``answer`` [2, most]:
    tokens and parents; how many there are, their score, and the length of what matched."""
    most = answer.shape[1]
    tokens, parents = np.empty(most, np.int64), np.empty(most, np.int64)
    ways = int(1.0 / least) + 2  # those that are open exclude each other
    edges, shares = np.empty((ways, 3), np.int64), np.empty(ways, np.float64)
    answered, best, matched = 0, 0.0, 0
    for length in range(1, len(context) + 1):
        node = _walk(nodes, heads, text, context, len(context) - length)
        if node == 0:
            break
        budget = min(most, int(length * factor + offset + 1e-6))
        if branch and budget > 1:
            num, score = _branches(
                nodes, text, oldest, node, length, budget, least, tokens, parents, edges, shares
            )
        else:
            num, score = _line(nodes, text, oldest, node, length, budget, least, tokens, parents)
        if num > 0 and score >= best:
            answered, best, matched = num, score, length
            answer[0, :num] = tokens[:num]
            answer[1, :num] = parents[:num]
    return answered, best, matched
