"""What PiSSA and OLoRA took out of the base: as training had it, and as PEFT converts it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.equivalence.test_oracle import prompts
from tests.harness import Harness

from loramux.adapters.canonical import widen
from loramux.adapters.formats import import_adapter, parse_config
from loramux.adapters.safetensors_file import read_tensors
from loramux.ingest.base import CheckpointWeights
from loramux.wire import BaseDescription


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama_mha_tied"])
def model(request: pytest.FixtureRequest, checkpoints: Callable[[tiny.Arch], Path]) -> Path:
    return checkpoints(request.param)


def trained(model: Path, folder: Path, init: str) -> Any:
    """PEFT's model in training. In ``folder``: ``start``, ``saved``, and ``converted`` by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=5, lora_alpha=9, target_modules=list(tiny.MODULES), init_lora_weights=init
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(tiny._load(model), config)
        peft_model.peft_config["default"].init_lora_weights = True
        peft_model.save_pretrained(str(folder / "start"))
        peft_model.peft_config["default"].init_lora_weights = init
        generator = torch.Generator().manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.5 * parameter.data.std() * noise
        peft_model.save_pretrained(str(folder / "saved"))
        peft_model.save_pretrained(
            str(folder / "converted"),
            path_initial_model_for_weight_conversion=str(folder / "start"),
        )
    return peft_model.eval()


def changes(folder: Path, model: Path, base: BaseDescription) -> dict[tuple[int, str], Any]:
    """What the adapter adds to every weight, in float64."""
    config = parse_config((folder / "adapter_config.json").read_bytes())
    with open(folder / "adapter_model.safetensors", "rb") as file:
        adapter = import_adapter(config, read_tensors(file), base, CheckpointWeights(model))
        return {
            (pair.layer, pair.module): pair.scale
            * widen(pair.b.read(), pair.b.dtype).astype(np.float64)
            @ widen(pair.a.read(), pair.a.dtype)
            for pair in adapter.pairs
        }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_change_is_that_of_training_and_of_pefts_conversion(
    model: Path, init: str, tmp_path: Path
) -> None:
    peft_model = trained(model, tmp_path, init)
    harness = Harness(model)
    ours = changes(tmp_path / "saved", model, harness.ready.base)
    converted = changes(tmp_path / "converted", model, harness.ready.base)
    assert ours.keys() == converted.keys() and len(ours) == 7 * harness.ready.base.num_layers
    weights = CheckpointWeights(model)
    for at, change in ours.items():
        weight = np.concatenate(list(weights.blocks(*at))).astype(np.float64)
        allowed = 1e-5 * np.abs(weight).max()
        if init == "pissa":
            # PEFT's own vectors are turned by about this in float32; ours are not.
            values = np.linalg.svd(weight, compute_uv=False)
            allowed = np.finfo(np.float32).eps * values[0] ** 2 / (values[4] - values[5])
        assert np.abs(change - converted[at]).max() < allowed < 1e-3 * np.abs(change).max(), at

    # PEFT takes the start out of the base again as it loads: the oracle of the other tests.
    prompt = prompts(1, seed=4)[0]
    with torch.no_grad():
        in_training = peft_model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(
        tiny.logits(model, prompt, tmp_path / "saved"), in_training, atol=2e-4, rtol=0
    )
    answer = harness.generate(prompt, tmp_path / "saved", max_tokens=1)
    assert answer == [int(in_training[-1].argmax())]
    harness.close()
