"""Checkpoints and adapters shared by the equivalence tests, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.equivalence.drafted import SAMPLINGS, served, told


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.Arch], Path]:
    """The tiny model of an architecture, by name."""
    made: dict[str, Path] = {}

    def checkpoint(arch: tiny.Arch) -> Path:
        if arch not in made:
            made[arch] = tiny.write_model(tmp_path_factory.mktemp(arch) / "base", arch)
        return made[arch]

    return checkpoint


ADAPTERS: dict[str, dict[str, Any]] = {
    "rank1": {"r": 1, "seed": 1, "b_scale": 0.3},
    "rank3": {"r": 3, "seed": 2},
    "rank8": {"r": 8, "seed": 3},
    "rank64": {"r": 64, "alpha": 32, "seed": 4},
    "rslora": {"r": 8, "use_rslora": True, "seed": 5},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 40.0},
        "seed": 6,
    },
    "partial": {"r": 8, "layers": [1], "seed": 7, "b_scale": 0.3},
    "single": {"r": 8, "targets": ["v_proj"], "seed": 8, "b_scale": 0.4},
    "bfloat16": {"r": 8, "dtype": "bfloat16", "seed": 9},
    "float16": {"r": 8, "dtype": "float16", "targets": ["o_proj", "down_proj"], "seed": 10},
}


@pytest.fixture(scope="session")
def llama(checkpoints: Callable[[tiny.Arch], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="session")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders for the tiny Llama: every shape of LoRA that is served."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: tiny.write_adapter(folder / name, llama, **knobs) for name, knobs in ADAPTERS.items()
    }


@pytest.fixture(scope="session")
def shouters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    """A model, and adapters that each force the token they are named by."""
    folder = tmp_path_factory.mktemp("shouters")
    model = tiny.write_model(folder / "base", "llama", shoutable=True)
    made = {
        token: tiny.shouting_adapter(
            folder / str(token),
            model,
            token,
            rank=1 + token % 7,
            through="mlp" if token < 42 else "attention",
        )
        for token in range(10, 48)
    }
    return model, made


@pytest.fixture(scope="module", params=SAMPLINGS)
def knobs(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How the requests of drafted tests draw."""
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def plain(llama: Path, adapters: dict[str, Path], knobs: dict[str, Any]) -> dict[str, Any]:
    """What they are told when nobody guesses."""
    harness = served(llama, adapters, knobs)
    harness.run()
    harness.close()
    return told(harness)
