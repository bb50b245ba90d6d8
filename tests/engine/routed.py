"""Requests that move between two models: what their tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness import Harness

from loramux.request import BASE_MODEL_ID, SMALL_MODEL_ID, EntropyAdaptive

PROMPT = list(range(60, 73))
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 24},
    "sampled": {"max_tokens": 24, "temperature": 1.0, "seed": 5},
    "processed": {
        "max_tokens": 24,
        "temperature": 0.9,
        "seed": 6,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": {9: 3.0},
        "choice": 1,
    },
}
NEVER_SMALL = EntropyAdaptive(threshold=-1.0, start="large")
NEVER_LARGE = EntropyAdaptive(threshold=math.inf, start="small")


def engine(models: tuple[Path, Path], **config: Any) -> Harness:
    return Harness(models[0], small_model=models[1], page_tokens=4, **config)


def run(harness: Harness, prompt: Sequence[int] = PROMPT, adapter: Any = None, **knobs: Any) -> str:
    """The id of one request from beginning to end; unless a ``tenant`` is named, one that finds
    nothing in the cache."""
    knobs = {"tenant": f"of {harness._serial}", **knobs}
    name = harness.submit(prompt, adapter, **knobs)
    harness.run()
    assert name not in harness.failed, harness.failed[name]
    return name


def drawn_by(harness: Harness, name: str) -> list[int]:
    """The model that each token is from, as the ledgers say."""
    told: list[int] = []
    for output in harness.details[name]:
        assert output.ledger is not None
        large, small = output.ledger[:2]
        new_large = large - told.count(BASE_MODEL_ID)
        new_small = small - told.count(SMALL_MODEL_ID)
        assert 0 in (new_large, new_small), "one step's tokens are all from one model"
        told += [BASE_MODEL_ID] * new_large + [SMALL_MODEL_ID] * new_small
        assert len(told) == output.start_index + len(output.token_ids)
    return told


def moves(told: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(told, told[1:], strict=False))
