"""Drafted = plain, token for token, with the drafters that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.equivalence.drafted import SAMPLINGS, disturbed, served, told
from tests.harness import Harness

from loramux.request import Speculation

CHAINS = [("suffix",), ("trigram",), ("suffix", "lookup"), ("lookup",), ("copyspec",)]
LEARNING = {"suffix", "trigram"}


@pytest.fixture(scope="module", params=SAMPLINGS)
def knobs(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Long enough for the tiny model to come back to what it said."""
    return {**SAMPLINGS[request.param], "max_tokens": 40}


def rows(harness: Harness) -> int:
    return sum(step.stats.get("batch_rows", 0) for step in harness.steps)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_with_what_was_learned_and_without(
    llama: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    plain: Any,
    chain: tuple[str, ...],
    tree: bool,
) -> None:
    """The second time the answers are known to drafters that learn."""
    speculation = Speculation(drafters=chain, max_draft_tokens=6, tree=tree)
    first = served(llama, adapters, knobs, speculation=speculation)
    first.run()
    first.close()
    assert told(first) == plain
    second = served(llama, adapters, knobs, speculation=speculation)
    second.engine.drafting.drafters.update(first.engine.drafting.drafters)
    second.run()
    second.close()
    assert told(second) == plain
    guessed = {output.drafted[0] for d in second.details.values() for output in d if output.drafted}
    assert guessed <= set(chain)
    if chain[0] in LEARNING:
        tokens = sum(len(ids) for ids in second.outputs.values())
        assert rows(second) < 0.6 * tokens, "what was guessed right was computed again"
        assert rows(second) < rows(first)


@pytest.mark.parametrize(("tree", "overlap"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", sorted(LEARNING))
def test_across_preemptions_and_small_steps(
    llama: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    plain: Any,
    name: str,
    overlap: bool,
    tree: bool,
) -> None:
    speculation = Speculation(drafters=(name,), max_draft_tokens=9, tree=tree)
    rng = np.random.default_rng(7)
    found = disturbed(llama, adapters, knobs, None, rng, overlap=overlap, speculation=speculation)
    assert found == plain


def test_a_prompt_of_one_token_after_others(llama: Path) -> None:
    """Learned from others, all drafters have something to say; of this one they know next to
    nothing."""
    harness = Harness(llama, draft_model=llama)
    names = tuple(harness.engine.drafting.drafters)
    assert {"suffix", "lookup", "copyspec", "trigram", "draft"} <= set(names)
    speculation = Speculation(drafters=names)
    plain = [harness.generate([id_], max_tokens=12) for id_ in (60, 61)]
    harness.generate([60] * 9, max_tokens=30, speculation=speculation)
    for name in names:
        only = Speculation(drafters=(name,))
        for chain in (only, speculation):
            drafted = [
                harness.generate([id_], max_tokens=12, speculation=chain) for id_ in (60, 61)
            ]
            assert drafted == plain, name
    harness.close()
