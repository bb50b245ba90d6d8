"""A pair of tiny models for requests that move between two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.engine.routed import NEVER_LARGE, NEVER_SMALL, engine, run
from tests.harness import Harness

from loramux.request import EntropyAdaptive
from loramux.speculation.entropy import Router


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a small model of other widths whose page holds another number of tokens."""
    folder = tmp_path_factory.mktemp("pair")
    large = tiny.write_model(folder / "large", num_hidden_layers=6)
    small = tiny.write_model(
        folder / "small",
        "qwen3",
        seed=1,
        num_hidden_layers=4,
        hidden_size=32,
        head_dim=8,
        num_key_value_heads=1,
    )
    return large, small


@pytest.fixture(scope="session")
def worn(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("worn")
    large = tiny.write_adapter(folder / "large", models[0], r=1, seed=3, b_scale=0.3)
    return large, tiny.write_adapter(folder / "small", models[1], r=1, seed=4, b_scale=0.3)


@pytest.fixture(scope="module")
def shared(models: tuple[Path, Path]) -> Iterator[Harness]:
    harness = engine(models, max_batch_tokens=32)
    yield harness
    harness.close()


@pytest.fixture(scope="module")
def how(shared: Harness) -> EntropyAdaptive:
    """Moves often: the threshold is the median of what the two models' entropies are."""
    seen: list[float] = []

    class Watching(Router):
        def observe(self, entropy: float) -> int:
            seen.append(entropy)
            return super().observe(entropy)

    shared.engine.new_router = Watching.resumed
    for alone in (NEVER_SMALL, NEVER_LARGE):
        run(shared, entropy=alone, max_tokens=24, temperature=1.0)
    shared.engine.new_router = Router.resumed
    assert len(seen) == 48 and 0 < min(seen) < max(seen) < math.log2(tiny.VOCAB_SIZE)
    return EntropyAdaptive(threshold=float(np.median(seen)), window=1, min_dwell=2)
