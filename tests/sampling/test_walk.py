"""The drafted walk is ancestral sampling: the same tokens for every draft, seed by seed, and hence
the same law; faulty walks are seen by the same eyes."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from loramux.sampling.verify import verified
from loramux_kernels.sampling import DrawParams, draw, stream_key

VOCAB, LENGTH = 4, 3
SEEDS = 300
Text = tuple[int, ...]
Drawn = Callable[[Text, int], int]
"""What is drawn behind a text, by the noise of one of several choices."""


class Draft(NamedTuple):
    """Two guesses and their parents."""

    token_ids: Text
    parents: Sequence[int] | None

    def ways(self) -> list[Text]:
        """The guesses that lead to each node, the root being node 0."""
        ways: list[Text] = [()]
        for token, parent in zip(self.token_ids, self.parents or range(2), strict=True):
            ways.append((*ways[parent], token))
        return ways


DRAFTS = [
    Draft(token_ids, parents)
    for token_ids in itertools.product(range(VOCAB), repeat=2)
    for parents in (None, (0, 1), (0, 0))
]
"""Every chain, chains told as trees, and every pair of siblings, equal ones too."""
TEXTS = [text for n in range(LENGTH) for text in itertools.product(range(VOCAB), repeat=n)]


def target() -> dict[Text, torch.Tensor]:
    """Logits behind every text that is short enough; some ids are forbidden, some are sure."""
    table = torch.randn(len(TEXTS), VOCAB, generator=torch.Generator().manual_seed(4))
    model = dict(zip(TEXTS, table, strict=True))
    model[(2,)][1] = -math.inf
    model[(1, 3)][[0, 1, 3]] = -math.inf
    return model


MODEL = target()
LAWS = {text: logits.double().softmax(-1).tolist() for text, logits in MODEL.items()}


def noisy(choices: int) -> list[Drawn]:
    """For each seed what keyed noise draws, by the sampling kernel itself."""
    rows = list(itertools.product(range(SEEDS), range(choices), TEXTS))
    how = DrawParams(
        temperature=np.ones(len(rows)),
        log_min_p=np.full(len(rows), -math.inf),
        top_k=np.zeros(len(rows), np.int64),
        top_p=np.ones(len(rows)),
        key=np.array([stream_key(100 * seed, choice) for seed, choice, _ in rows], np.uint64),
    )
    position = np.array([len(text) for _, _, text in rows])
    tokens = draw(torch.stack([MODEL[text] for _, _, text in rows]), how, position)[0].tolist()
    drawn = dict(zip(rows, tokens, strict=True))
    return [lambda text, choice, s=seed: drawn[s, choice, text] for seed in range(SEEDS)]  # type: ignore[misc]


def plain(drawn: Drawn) -> Text:
    text: Text = ()
    while len(text) < LENGTH:
        text += (drawn(text, 0),)
    return text


Step = Callable[[Text, Draft, Drawn], Text]
"""What one step adds to a text."""


def step(text: Text, draft: Draft, drawn: Drawn) -> Text:
    tokens = [drawn(text + way, 0) for way in draft.ways()]
    return tuple(tokens[node] for node in verified(draft.token_ids, tokens, (), draft.parents))


def longest(text: Text, draft: Draft, drawn: Drawn) -> Text:
    """A draw for each way through the tree, by noise of its own; the one that gets furthest."""
    found: list[Text] = []
    ways = draft.ways()
    leaves = [way for way in ways if not any(other[:-1] == way for other in ways[1:])]
    for choice, leaf in enumerate(leaves):
        tokens = [drawn(text + leaf[:depth], choice) for depth in range(len(leaf) + 1)]
        path = verified(leaf, tokens)
        found.append(tuple(tokens[node] for node in path))
    return max(found, key=len)


def again(text: Text, draft: Draft, drawn: Drawn) -> Text:
    """Where a guess is wrong, what comes there is drawn a second time."""
    tokens = step(text, draft, drawn)
    if len(tokens) > max(map(len, draft.ways())):
        return tokens
    return (*tokens[:-1], drawn(text + tokens[:-1], 1))


def lenient(text: Text, draft: Draft, drawn: Drawn) -> Text:
    """The first guess is right whatever is drawn."""
    first = draft.token_ids[0]
    return (first, drawn((*text, first), 0))


FAULTS = [longest, again, lenient]


def walked(step: Step, draft: Draft, drawn: Drawn) -> Text:
    """The same draft first, and as often as it fits."""
    text: Text = ()
    while len(text) < LENGTH:
        fits = len(text) + max(map(len, draft.ways())) < LENGTH
        text += step(text, draft, drawn) if fits else (drawn(text, 0),)
    return text


def distance(one: dict[Text, float], other: dict[Text, float]) -> float:
    """In total variation."""
    return sum(abs(one[text] - other[text]) for text in {*one, *other}) / 2


class Unknown(Exception):
    """Nobody has said yet what is drawn here."""


def law(walk: Callable[[Drawn], Text]) -> dict[Text, float]:
    """The law of what ``walk`` returns, every way that its draws can go counted once.

    Draws behind different texts are independent here. Keyed ones of the same position are not; but
    what a right walk returns rests on one draw of each position.
    """
    found: dict[Text, float] = defaultdict(float)
    open_ends: list[tuple[dict[tuple[Text, int], int], float]] = [({}, 1.0)]
    while open_ends:
        known, chance = open_ends.pop()

        def drawn(text: Text, choice: int, known: Any = known) -> int:
            if (text, choice) not in known:
                raise Unknown(text, choice)
            return int(known[text, choice])

        try:
            found[walk(drawn)] += chance
        except Unknown as unknown:
            for token, probability in enumerate(LAWS[unknown.args[0]]):
                if probability:
                    open_ends.append(({**known, unknown.args: token}, chance * probability))
    return found


def test_the_law_is_that_of_ancestral_sampling_for_every_draft() -> None:
    ancestral = law(plain)
    assert sum(ancestral.values()) == pytest.approx(1, abs=1e-12)
    for draft in DRAFTS:
        assert distance(law(partial(walked, step, draft)), ancestral) < 1e-12


@pytest.mark.parametrize("fault", FAULTS)
def test_the_law_of_a_faulty_walk_is_another(fault: Step) -> None:
    ancestral = law(plain)
    some = [Draft((0, 1), None), Draft((3, 3), None), Draft((0, 2), (0, 0))]
    assert max(distance(law(partial(walked, fault, draft)), ancestral) for draft in some) > 0.01


def test_every_draft_gives_the_tokens_of_every_seed() -> None:
    for drawn in noisy(1):
        assert {walked(step, draft, drawn) for draft in DRAFTS} == {plain(drawn)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_walk_gives_other_tokens(fault: Step) -> None:
    wrong = [
        any(walked(fault, draft, drawn) != plain(drawn) for draft in DRAFTS) for drawn in noisy(2)
    ]
    assert sum(wrong) > SEEDS / 10
