"""A compressed adapter answers as PEFT does with the values it stands for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.equivalence.test_oracle import Excuses, prompts
from tests.harness import Harness

from loramux.adapters import compeft
from loramux_client import compress

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "b_scale": 0.3},
    "rslora": {"r": 8, "use_rslora": True, "seed": 5, "b_scale": 0.3},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 40.0},
        "seed": 6,
        "b_scale": 0.3,
    },
    "bfloat16": {"r": 8, "dtype": "bfloat16", "seed": 9, "b_scale": 0.3},
    "float16": {"r": 8, "dtype": "float16", "targets": ["o_proj", "down_proj"], "b_scale": 0.3},
}


def by_definition(source: Path, target: Path, density: float, alpha: float) -> Path:
    """The same adapter with ComPEFT's values in full, for PEFT to load."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    dtype = next(iter(tensors.values())).dtype
    tau = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    kept = math.ceil(density * len(tau))
    smallest = tau.abs().kthvalue(len(tau) - kept + 1).values
    value = (alpha * tau.std()).to(dtype)
    for name, values in tensors.items():
        stays = values.double().abs() >= smallest
        tensors[name] = torch.where(stays, value * values.sign(), torch.zeros_like(values))
    save_file(tensors, file)
    return target


def compressed(source: Path, target: Path, density: float, alpha: float) -> Path:
    target.mkdir()
    files = compress(source, density, alpha).files
    for name, file in (("config.json", files.config), ("model.safetensors", files.weights)):
        with file.open() as data:
            (target / f"adapter_{name}").write_bytes(data.read())
    assert compeft.KEY in json.loads((target / "adapter_config.json").read_bytes())
    return target


@pytest.mark.parametrize(("density", "alpha"), [(0.2, 1.0), (0.5, 0.75)])
def test_ids_are_pefts_with_the_expanded_values(
    density: float, alpha: float, llama: Path, tmp_path: Path
) -> None:
    harness = Harness(llama)
    excuses, same = Excuses(), 0
    prompt = prompts(1, seed=4)[0]
    asked = {}
    for name, knobs in ADAPTERS.items():
        source = tiny.write_adapter(tmp_path / name, llama, **knobs)
        oracle = by_definition(source, tmp_path / f"{name}-full", density, alpha)
        small = compressed(source, tmp_path / f"{name}-small", density, alpha)
        asked[harness.submit(prompt, small, max_tokens=16)] = source, oracle
    outputs = harness.run()
    for request_id, (source, oracle) in asked.items():
        excuses.compare(outputs[request_id], *tiny.greedy(llama, prompt, 16, oracle))
        same += outputs[request_id] == tiny.greedy(llama, prompt, 16, source)[0]
    excuses.check()
    assert same < len(asked), "compression changed nothing that shows"
    harness.close()
