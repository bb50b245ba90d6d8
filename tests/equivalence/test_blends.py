"""Blended adapters answer as what they stand for: a list of adapters, dense changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.adapters.blending import Deltas, blend, deltas
from tests.equivalence.test_oracle import Excuses, prompts
from tests.harness import Harness

from loramux.wire import module_path

WEIGHTS = {"rank3": 0.75, "rslora": -0.5, "patterns": 1.5, "partial": 1.0}


def merged(into: Path, model: Path, changes: Deltas) -> Path:
    """The model with dense changes added in float64."""
    into.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (into / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    for at, change in changes.items():
        name = f"model.{module_path(*at)}.weight"
        tensors[name] = (tensors[name].double() + torch.from_numpy(change)).float()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def test_a_soup_answers_as_the_list_of_its_sources(
    llama: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    harness = Harness(llama)
    sources = [(adapters[name], weight) for name, weight in WEIGHTS.items()]
    blend(tmp_path, sources, harness.ready.base, method="soup")
    excuses = Excuses()
    for prompt in prompts(4, seed=11):
        soup = harness.submit(prompt, tmp_path, max_tokens=16)
        listed = harness.submit(prompt, sources, max_tokens=16)
        fewer = harness.submit(prompt, sources[:-1], max_tokens=16)
        outputs = harness.run()
        ids, gaps = tiny.greedy(llama, prompt, 16, tmp_path)
        excuses.compare(outputs[soup], ids, gaps)
        excuses.compare(outputs[listed], ids, gaps)
        assert outputs[soup] != outputs[fewer], "too weak to tell a source that is missing"
    excuses.check()
    harness.close()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "llama_mha_tied"])
def test_scaled_layers_answer_as_a_model_with_scaled_changes(
    arch: tiny.Arch, tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", arch)
    source = tiny.write_adapter(tmp_path / "source", model, r=6, seed=3, b_scale=0.15)
    harness = Harness(model)
    base = harness.ready.base
    into = tmp_path / "scaled"
    into.mkdir()
    blend(into, [(source, 1.0)], base, method="scale_layers", alpha=0.4, beta=0.9)
    changes = {
        (layer, module): change * (0.4 + 0.9 * layer / (base.num_layers - 1))
        for (layer, module), change in deltas(source, base).items()
    }
    oracle = merged(tmp_path / "merged", model, changes)
    excuses = Excuses()
    for prompt in prompts(3, seed=12):
        scaled = harness.submit(prompt, into, max_tokens=16)
        plain = harness.submit(prompt, source, max_tokens=16)
        outputs = harness.run()
        excuses.compare(outputs[scaled], *tiny.greedy(oracle, prompt, 16))
        assert outputs[scaled] != outputs[plain]
    excuses.check()
    harness.close()
