"""Models that guess and models that are guessed for, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.speculation.drafting import Bench


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of 30 narrow layers, and one of 4 with wider heads to guess for it; a usual pair."""
    folder = tmp_path_factory.mktemp("draft-model")
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return {
        "deep": tiny.write_model(
            folder / "deep", num_hidden_layers=30, num_key_value_heads=1, **narrow
        ),
        "wide": tiny.write_model(
            folder / "wide", num_hidden_layers=4, head_dim=32, max_position_embeddings=40, seed=8
        ),
        "target": tiny.write_model(folder / "target", shoutable=True),
        "other": tiny.write_model(folder / "other", "qwen2", seed=7),
    }


@pytest.fixture
def bench(models: dict[str, Path]) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(model: str = "target", draft: str = "other", **config: Any) -> Bench:
        made.append(Bench(models[model], models[draft], **config))
        return made[-1]

    yield make
    for each in made:
        each.harness.close()
