"""Typical acceptance: other tokens than plain decoding draws, but exactly those its rule says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.harness import Harness

from loramux.request import Request, Speculation
from loramux.speculation.drafter import Ask, Guess
from loramux_kernels.sampling import DrawParams, reference, stream_key

SEED = 5
PROMPT = list(range(60, 71))
TREE = [0, 0, 1, 2, 3]


class Likely:
    """Guesses from the ids alone: what is likely by ``model``, now and then what is not."""

    def __init__(self, model: Path, adapter: Path | None) -> None:
        self._model, self._adapter = model, adapter

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self.guess(self.ids(ask), ask.may_branch, ask.most) for ask in asks]

    def ended(self, request: Request) -> None: ...

    @staticmethod
    def ids(ask: Ask) -> list[int]:
        ids: list[int] = ask.request.ids[: ask.request.num_ids].tolist()
        return ids

    def guess(self, ids: list[int], tree: bool, most: int) -> Guess:
        parents = TREE if tree else list(range(3))
        parents = parents[:most]
        texts = [ids]
        for node, parent in enumerate(parents):
            best = tiny.logits(self._model, texts[parent], self._adapter)[-1].topk(9).indices
            rank = (len(ids) + 2 * node) % 3 if len(ids) % 4 else 8
            texts.append([*texts[parent], int(best[rank])])
        return Guess([text[-1] for text in texts[1:]], parents if tree else None)


def by_the_rule(drafter: Likely, adapter: Path | None, model: Path, tree: bool, n: int) -> Any:
    """The same text one token after the other, and how many of them were not drawn."""
    ids, lenient = list(PROMPT), 0
    params = DrawParams(
        temperature=np.ones(1),
        log_min_p=np.full(1, -math.inf),
        top_k=np.zeros(1, np.int64),
        top_p=np.ones(1),
        key=np.array([stream_key(SEED, 0)], np.uint64),
    )
    first = True  # the prompt's own step has nothing to verify
    while (done := len(ids) - len(PROMPT)) < n:
        most = min(8, n - done - 1)
        guess = Guess() if first else drafter.guess(ids, tree, most)
        parents = guess.parents or list(range(len(guess.token_ids)))
        node, first = 0, False
        while True:
            logits = tiny.logits(model, ids, adapter)[-1]
            p = logits.double().softmax(-1)
            least = min(0.09, 0.3 * math.exp(-float(torch.special.entr(p).sum())))
            at = np.array([len(ids) - len(PROMPT)])
            drawn = int(reference.draw(logits[None], params, at)[0][0])
            for child, parent in enumerate(parents):
                token = guess.token_ids[child]
                if parent == node and (token == drawn or p[token] > least):
                    lenient += token != drawn
                    node = child + 1
                    ids.append(token)
                    break
            else:
                ids.append(drawn)
                break
    return ids[len(PROMPT) :], lenient


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("adapter", [None, "rank3"])
def test_what_is_delivered_is_what_the_rule_says(
    llama: Path, adapters: dict[str, Path], tree: bool, adapter: str | None, overlap: bool
) -> None:
    wears = adapters[adapter] if adapter else None
    drafter = Likely(llama, wears)
    want, lenient = by_the_rule(drafter, wears, llama, tree, 20)
    assert lenient >= 2, "nothing hangs on the rule here"
    harness = Harness(llama, page_tokens=4, overlap=overlap)
    harness.engine.drafting.drafters["likely"] = drafter
    knobs: dict[str, Any] = {"max_tokens": 20, "seed": SEED, "stop_token_ids": ()}

    def asked(typical: bool) -> Speculation:
        return Speculation(drafters=("likely",), tree=tree, typical=typical)

    name = harness.submit(
        PROMPT, wears, temperature=1.0, logprobs=0, speculation=asked(True), **knobs
    )
    other = harness.submit(PROMPT, temperature=1.0, speculation=asked(False), **knobs)
    harness.run()
    assert harness.outputs[name] == want
    again = harness.generate(PROMPT, wears, temperature=1.0, speculation=asked(True), **knobs)
    assert again == want, "the same seed, the same text"
    exact = harness.generate(PROMPT, wears, temperature=1.0, **knobs)
    assert exact != want
    assert harness.outputs[other] == harness.generate(PROMPT, temperature=1.0, **knobs)
    entries = [entry for output in harness.details[name] for entry in output.logprobs or ()]
    assert [entry.token_id for entry in entries] == want
    scores = tiny.logits(llama, [*PROMPT, *want], wears).log_softmax(-1)[len(PROMPT) - 1 :]
    for entry, score in zip(entries, scores, strict=False):
        assert entry.logprob == pytest.approx(float(score[entry.token_id]), abs=1e-3)
    greedy = harness.generate(PROMPT, wears, speculation=asked(True), **knobs)
    assert greedy == harness.generate(PROMPT, wears, **knobs)
    harness.close()


def test_an_end_is_always_drawn(llama: Path) -> None:
    """A typical guess that would stop the request does not."""
    drafter = Likely(llama, None)
    speculation = Speculation(drafters=("likely",), typical=True)
    stops = tuple(range(0, tiny.VOCAB_SIZE, 2))
    harness = Harness(llama, page_tokens=4)
    harness.engine.drafting.drafters["likely"] = drafter
    for seed in range(6):
        knobs: dict[str, Any] = {"seed": seed, "max_tokens": 12, "stop_token_ids": stops}
        name = harness.submit(
            PROMPT, temperature=1.0, min_tokens=2, speculation=speculation, **knobs
        )
        harness.run()
        ended = harness.finished[name].stop_token_id
        ids = harness.outputs[name]
        assert not set(ids[:-1]) & set(stops)
        assert ended is None or ended == ids[-1]
    harness.close()
