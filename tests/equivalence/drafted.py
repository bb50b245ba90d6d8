"""The traffic on which drafted and plain are compared, and what a client sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests import tiny
from tests.harness import Harness

from loramux.request import Speculation

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "processed": {
        "temperature": 0.9,
        "seed": 6,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {9: 3.0},
        "min_tokens": 5,
        "stop_token_ids": tuple(range(30, 60)),
        "logprobs": 2,
    },
}
MOST = 5
NUM_TOKENS = 14


def served(
    model: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    drafter: Any = None,
    speculation: Speculation | None = None,
    **config: Any,
) -> Harness:
    """Three adapters, the base, and three choices of one prompt, with or without guesses: those of
    ``drafter``, or of the engine's own as ``speculation`` has it."""
    harness = Harness(model, page_tokens=4, **config)
    if drafter is not None:
        harness.engine.drafting.drafters["scripted"] = drafter
        speculation = Speculation(drafters=("scripted",), max_draft_tokens=MOST)
    rng = np.random.default_rng(3)
    for index, name in enumerate([None, *list(adapters)[:3], "three"]):
        prompt = rng.integers(60, tiny.VOCAB_SIZE, 9 + index).tolist()
        adapter = list(adapters.values())[0] if name == "three" else adapters.get(name or "")
        for choice in range(3 if name == "three" else 1):
            harness.submit(
                prompt,
                adapter,
                name=f"{name}-{choice}",
                speculation=speculation,
                **{"max_tokens": NUM_TOKENS, "choice": choice, **knobs},
            )
    return harness


def told(harness: Harness) -> dict[str, Any]:
    """All that a client sees: ids, log-probabilities, how it ended."""
    return {
        name: (
            ids,
            [entry for output in harness.details[name] for entry in output.logprobs or ()],
            (harness.finished[name].reason, harness.finished[name].stop_token_id),
        )
        for name, ids in harness.outputs.items()
    }


def truth(plain: dict[str, Any]) -> dict[str, list[int]]:
    """What each request says."""
    return {name: entry[0] for name, entry in plain.items()}


def disturbed(
    model: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    drafter: Any,
    rng: np.random.Generator,
    *,
    overlap: bool,
    speculation: Speculation | None = None,
) -> dict[str, Any]:
    """What is told when steps are small and, without overlap, rows are preempted at random."""
    harness = served(
        model,
        adapters,
        knobs,
        drafter,
        speculation,
        overlap=overlap,
        max_batch_tokens=int(rng.integers(16, 40)),
    )
    harness.run_preempting(rng, 0.0 if overlap else 0.1)
    found = told(harness)
    harness.close()
    return found
