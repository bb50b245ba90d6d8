"""Drafted = plain, token for token, when the guesses are a second model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.equivalence.drafted import MOST, served, told
from tests.harness import Harness, install_adapter

from loramux.request import DRAFT_MODEL_ID, AdapterRef, Speculation


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing of the target: its guesses are hardly ever right."""
    folder = tmp_path_factory.mktemp("stranger")
    return tiny.write_model(folder / "draft", "qwen3", seed=5, head_dim=32)


def drafted(
    model: Path, adapters: dict[str, Path], knobs: dict[str, Any], draft: Path, **config: Any
) -> Harness:
    speculation = Speculation(drafters=("draft",), max_draft_tokens=MOST)
    return served(model, adapters, knobs, None, speculation, draft_model=draft, **config)


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
    harness = drafted(llama, adapters, knobs, stranger, overlap=overlap)
    harness.run()
    assert told(harness) == plain
    guessed, right = guesses(harness)
    assert guessed > 50 and right < guessed / 2
    harness.close()


def test_the_base_guesses_for_its_adapters(
    llama: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Right and wrong guesses in turn; some rows wear a companion, others none."""
    harness = drafted(llama, adapters, knobs, llama, max_batch_tokens=24)
    base = harness.ready.partners[DRAFT_MODEL_ID]
    digest = install_adapter(list(adapters.values())[1], harness.data_dir, base)
    for request in list(harness.engine._requests.values())[1::2]:
        request.companions = {DRAFT_MODEL_ID: (AdapterRef(digest, 0.5),)}
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
    harness = drafted(llama, adapters, knobs, llama, num_frames=44)
    harness.run_preempting(rng, 0.15)
    assert told(harness) == plain
    assert guesses(harness)[1] > 0
    harness.close()
