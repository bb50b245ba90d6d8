"""Drafted = plain, token for token, when the guesses are a second model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.equivalence.test_drafted import SAMPLINGS, told
from tests.harness import Harness, install_adapter

from loramux.request import DRAFT_MODEL_ID, AdapterRef, Speculation

NUM_TOKENS = 14


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing of the target: its guesses are hardly ever right."""
    folder = tmp_path_factory.mktemp("stranger")
    return tiny.write_model(folder / "draft", "qwen3", seed=5, head_dim=32)


def served(
    model: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    draft: Path | None = None,
    companion: Path | None = None,
    **config: Any,
) -> Harness:
    """Three adapters, the base, and three choices of one prompt, with or without guesses; every
    other adapter's requests have a companion."""
    harness = Harness(model, page_tokens=4, draft_model=draft, **config)
    speculation, companions = None, {}
    if draft is not None:
        speculation = Speculation(drafters=("draft",), max_draft_tokens=5)
    if companion is not None:
        base = harness.ready.partners[DRAFT_MODEL_ID]
        digest = install_adapter(companion, harness.data_dir, base)
        companions = {DRAFT_MODEL_ID: (AdapterRef(digest, 0.5),)}
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
                companions=companions if index % 2 else {},
                **{"max_tokens": NUM_TOKENS, "choice": choice, **knobs},
            )
    return harness


@pytest.fixture(scope="module", params=SAMPLINGS)
def knobs(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def plain(llama: Path, adapters: dict[str, Path], knobs: dict[str, Any]) -> dict[str, Any]:
    harness = served(llama, adapters, knobs)
    harness.run()
    harness.close()
    return told(harness)


def guesses(harness: Harness) -> tuple[int, int]:
    """How many there were, and how many of them were right."""
    outputs = [o for outputs in harness.details.values() for o in outputs if o.drafted]
    return (
        sum(output.drafted[1] for output in outputs if output.drafted),
        sum(len(output.token_ids) - 1 for output in outputs),
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stranger_guesses(
    llama: Path,
    stranger: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    plain: dict[str, Any],
    overlap: bool,
) -> None:
    harness = served(llama, adapters, knobs, stranger, overlap=overlap)
    harness.run()
    assert told(harness) == plain
    guessed, right = guesses(harness)
    assert guessed > 50 and right < guessed / 2
    harness.close()


def test_the_base_guesses_for_its_adapters(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Right and wrong guesses in turn; some rows wear a companion, others none."""
    companion = list(adapters.values())[1]
    harness = served(llama, adapters, knobs, llama, companion, max_batch_tokens=24)
    harness.run()
    assert told(harness) == plain
    guessed, right = guesses(harness)
    assert 0 < right < guessed
    harness.close()


def test_across_preemption_and_eviction(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: dict[str, Any]
) -> None:
    """A pool too small for all, and rows sent back at random."""
    rng = np.random.default_rng(4)
    harness = served(llama, adapters, knobs, llama, num_frames=44)
    while harness.engine.has_work:
        harness.step()
        running = harness.engine.scheduler.running
        if running and rng.random() < 0.15:
            harness.engine.scheduler._preempt(running[int(rng.integers(len(running)))])
    assert told(harness) == plain
    assert guesses(harness)[1] > 0
    harness.close()
