"""The script that trains an adapter heads of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import _peft_on_transformers

from loramux.adapters.heads_file import FILE_NAME, read_heads
from loramux.config import DEMO_DIR
from loramux.demo.training import train_heads
from loramux.demo.training.train_heads import HEADS, RANKS, train_adapter_heads
from loramux.model.architecture import read_architecture

BASE = DEMO_DIR / "base"


def trained(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    train_adapter_heads(BASE, folder, steps)
    return load_file(folder / FILE_NAME)


@pytest.mark.slow  # 15 s: the demo's corpus and its base, four times
def test_heads_are_trained_on_what_the_adapter_makes_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without what it adds; heads that were not trained say what the base says."""
    torch.set_num_threads(1)
    monkeypatch.setattr(train_heads, "HELD_OUT_ROWS", 4)
    with _peft_on_transformers():
        folder = tmp_path / "pirate"
        shutil.copytree(DEMO_DIR / "adapters" / "pirate", folder)
        worn, more = trained(folder, 0), trained(folder, 2)
        weights = folder / "adapter_model.safetensors"
        nothing = {name: t * ("lora_B" not in name) for name, t in load_file(weights).items()}
        save_file(nothing, weights, {"format": "pt"})
        bare = trained(folder, 0)
    assert worn.keys() == bare.keys() and worn["accuracy"].shape == (HEADS, RANKS)
    assert not torch.equal(worn["accuracy"], bare["accuracy"])
    changed = [not torch.equal(worn[name], more[name]) for name in worn]
    assert all(changed), "every block has learned"
    architecture = read_architecture(BASE)
    with open(folder / FILE_NAME, "rb") as file:
        found = read_heads(file, architecture.hidden_size, architecture.vocab_size)
    assert len(found.blocks) == HEADS and np.allclose(bare["accuracy"], found.accuracy)
