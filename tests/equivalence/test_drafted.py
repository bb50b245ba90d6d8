"""Drafted = plain, token for token, whoever guesses and however badly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.equivalence.drafted import MOST, SAMPLINGS, disturbed, served, told, truth
from tests.harness import Harness
from tests.trees import random_parents, way_to

from loramux.engine import counted
from loramux.request import Request, Speculation
from loramux.speculation.drafter import Ask, Guess
from loramux_kernels.testing import counting

SLACK = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Scripted:
    """Knows how each request goes on, and is right for as many tokens as ``right`` says, then
    wrong, ``length`` in all."""

    def __init__(
        self,
        truth: dict[str, list[int]],
        right: Callable[[], int],
        length: Callable[[], int],
    ) -> None:
        self._truth, self._right, self._length = truth, right, length

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [Guess(self._guess(ask.request, ask.most)) for ask in asks]

    def ended(self, request: Request) -> None: ...

    def _guess(self, request: Request, most: int) -> Sequence[int]:
        length = min(most, self._length())
        future = self._truth[request.id][request.num_outputs :][:length]
        future += [3] * (length - len(future))
        for place in range(min(self._right(), length), length):
            future[place] = (future[place] + 1 + place % 2) % tiny.VOCAB_SIZE
        return future


class ScriptedTrees:
    """Knows how each request goes on: where a node of the trees it grows (their ``parents``, for so
    many guesses at most) is ``right`` it has the token that comes at its depth, else another."""

    def __init__(
        self,
        truth: dict[str, list[int]],
        grow: Callable[[int], list[int]],
        right: Callable[[int], bool],
    ) -> None:
        self._truth, self._grow, self._right = truth, grow, right

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._guess(ask.request, ask.most) for ask in asks]

    def ended(self, request: Request) -> None: ...

    def _guess(self, request: Request, most: int) -> Guess:
        parents = self._grow(most)
        future = [*self._truth[request.id][request.num_outputs :], *[3] * most]
        token_ids = []
        for node in range(1, len(parents) + 1):
            token = future[len(way_to(parents, node)) - 2]
            wrong = (token + 1 + node % 2) % tiny.VOCAB_SIZE
            token_ids.append(token if self._right(node) else wrong)
        return Guess(token_ids, parents)


@pytest.mark.parametrize("right", range(MOST + 1))
def test_right_then_wrong_at_each_position(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: Any, right: int
) -> None:
    drafter = Scripted(truth(plain), lambda: right, lambda: MOST)
    harness = served(llama, adapters, knobs, drafter)
    harness.run()
    assert told(harness) == plain
    steps = sum(step.stats.get("batch_rows", 0) for step in harness.steps)
    tokens = sum(len(ids) for ids in harness.outputs.values())
    if right == MOST:
        assert steps < tokens / 2, "what was guessed right was computed again"
    if right == 0:
        assert steps >= tokens
    harness.close()


@SLACK
@given(data=st.data())
def test_any_guesses_across_preemptions_and_small_steps(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: Any, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    drafter = Scripted(
        truth(plain), lambda: int(rng.integers(0, MOST + 2)), lambda: int(rng.integers(0, 9))
    )
    overlap = data.draw(st.booleans())
    assert disturbed(llama, adapters, knobs, drafter, rng, overlap=overlap) == plain


def test_a_right_branch_beside_a_wrong_one(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: Any
) -> None:
    """The first guess is wrong, the others are a line beside it: their KV must move up."""
    drafter = ScriptedTrees(
        truth(plain), lambda most: [0, 0, *range(2, most)][:most], lambda node: node != 1
    )
    with counting() as calls:
        harness = served(llama, adapters, knobs, drafter)
        harness.run()
    assert told(harness) == plain
    steps = sum(step.stats.get("batch_rows", 0) for step in harness.steps)
    tokens = sum(len(ids) for ids in harness.outputs.values())
    assert steps < tokens / 2, "what was guessed right was computed again"
    moved = calls["cpu:compact"]
    assert 0 < moved <= calls["cpu:run_layers"], "one call a step moves what all rows keep"
    harness.close()


@SLACK
@given(data=st.data())
def test_any_trees_across_preemptions_and_small_steps(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: Any, data: st.DataObject
) -> None:
    """Right nodes anywhere, all wrong, or all right: then siblings are equal."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    luck = data.draw(st.sampled_from([0.0, 0.5, 0.8, 1.0]))
    drafter = ScriptedTrees(
        truth(plain),
        lambda most: random_parents(rng, int(rng.integers(0, most + 1))),
        lambda node: rng.random() < luck,
    )
    overlap = data.draw(st.booleans())
    assert disturbed(llama, adapters, knobs, drafter, rng, overlap=overlap) == plain


@pytest.mark.parametrize("length", [1, 17])
def test_the_prompts_log_probabilities_beside_a_tree(llama: Path, length: int) -> None:
    """The prompt's last token is alone in its step, so it is the root of a tree already."""
    prompt = list(range(60, 60 + length))
    details = []
    known: dict[str, list[int]] = {}
    for drafter in (None, ScriptedTrees(known, lambda most: [0] * most, lambda node: node == 2)):
        harness = Harness(llama, page_tokens=4, max_batch_tokens=16)
        speculation = None
        if drafter is not None:
            harness.engine.drafting.drafters["scripted"] = drafter
            speculation = Speculation(drafters=("scripted",), max_draft_tokens=3)
        harness.submit(
            prompt, name="a", prompt_logprobs=2, logprobs=1, speculation=speculation, max_tokens=6
        )
        harness.run()
        known.update(harness.outputs)
        details.append((told(harness), [o.prompt_logprobs for o in harness.details["a"]][:1]))
        harness.close()
    assert details[0] == details[1]


@pytest.mark.parametrize("trees", [False, True])
def test_the_cache_holds_what_a_fresh_prefill_computes(
    llama: Path, adapters: dict[str, Path], plain: Any, trees: bool
) -> None:
    """Pages filled by guesses serve the next request; wrong ones never get into them."""
    rng = np.random.default_rng(1)
    chains = Scripted(truth(plain), lambda: int(rng.integers(0, MOST + 1)), lambda: MOST)
    branched = ScriptedTrees(
        truth(plain), lambda most: random_parents(rng, most), lambda node: rng.random() < 0.7
    )
    harness = served(llama, adapters, SAMPLINGS["greedy"], branched if trees else chains)
    names = list(harness.outputs)
    harness.run()
    prompt = list(range(60, 70))
    for name in names[:2]:
        adapter = adapters.get(name.rpartition("-")[0])
        again = [*prompt, *harness.outputs[name]]
        hit = harness.generate(again, adapter, max_tokens=6)
        fresh = harness.generate(again, adapter, max_tokens=6, tenant="fresh")
        assert hit == fresh
    harness.close()


@pytest.mark.parametrize("trees", [False, True])
def test_a_verifier_that_accepts_one_wrong_token_is_caught(
    llama: Path, adapters: dict[str, Path], plain: Any, knobs: Any, trees: bool, monkeypatch: Any
) -> None:
    def lenient(drafts: Sequence[int], drawn: Sequence[int], *rest: Any) -> list[int]:
        return list(range(len(drawn)))[:2]

    monkeypatch.setattr(counted, "verified", lenient)
    drafter: Any = Scripted(truth(plain), lambda: 0, lambda: 2)
    if trees:
        drafter = ScriptedTrees(truth(plain), lambda most: [0] * most, lambda node: False)
    harness = served(llama, adapters, knobs, drafter)
    harness.run()
    assert told(harness) != plain
    harness.close()
