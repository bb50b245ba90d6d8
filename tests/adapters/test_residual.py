"""PiSSA and OLoRA: what was taken out of the base is computed again, or the adapter refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.adapters.peft_files import (
    Tensors,
    base_description,
    make_config,
    make_tensors,
    module_name,
    safetensors_bytes,
    tensor_name,
)

from loramux.adapters.canonical import CanonicalAdapter, widen
from loramux.adapters.formats import import_adapter, residual
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid
from loramux.wire import BaseDescription

BASE = base_description(hidden=33, inter=47, heads=5, kv_heads=1, head_dim=7)
MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Weights:
    """Random weights in blocks of ten rows."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.values = {
            (layer, module): rng.standard_normal(widths[::-1]).astype(np.float32)
            for layer in range(BASE.num_layers)
            for module, widths in BASE.widths.items()
        }

    def blocks(self, layer: int, module: str) -> Iterator[Any]:
        values = self.values[layer, module]
        yield from (values[row : row + 10] for row in range(0, len(values), 10))

    def bias(self, layer: int, module: str) -> None:
        """There is none."""


def do_import(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    weights: Weights,
    base: BaseDescription = BASE,
) -> tuple[CanonicalAdapter, dict[tuple[int, str], Any]]:
    """The adapter, and what it adds to each weight."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    with open(path, "rb") as file:
        adapter = import_adapter(json.loads(json.dumps(config)), read_tensors(file), base, weights)
        changes = {}
        for pair in adapter.pairs:
            a, b = (widen(m.read(), m.dtype).astype(np.float64) for m in (pair.a, pair.b))
            assert a.shape == pair.a.shape and b.shape == pair.b.shape
            assert pair.rank == a.shape[0] == b.shape[1]
            changes[pair.layer, pair.module] = pair.scale * b @ a
    return adapter, changes


def refusal(*args: Any) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        do_import(*args)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


def config_of(init: str, **fields: Any) -> dict[str, Any]:
    return make_config(init_lora_weights=init, target_modules=list(MODULES), **fields)


TENSORS = make_tensors(BASE, modules=MODULES)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_every_shape_of_weight(
    tmp_path: Path, init: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tall, wide and square; rank 7 is all that v_proj has, and leaves nothing of it."""
    monkeypatch.setattr(residual, "_BLOCK", 10)
    weights, scale = Weights(), 8 / rank
    tensors = make_tensors(BASE, modules=MODULES, rank=rank)
    adapter, changes = do_import(tmp_path, config_of(init, r=rank), tensors, weights)
    assert {pair.rank for pair in adapter.pairs} == {2 * rank}
    for (layer, module), change in changes.items():
        weight = weights.values[layer, module].astype(np.float64)
        if init == "pissa":
            u, s, vh = np.linalg.svd(weight)
            start = (u[:, :rank] * s[:rank]) @ vh[:rank]
        else:
            q, r = np.linalg.qr(weight)
            start = scale * q[:, :rank] @ r[:rank]
        trained = scale * (
            tensors[tensor_name(layer, module, "B")].astype(np.float64)
            @ tensors[tensor_name(layer, module, "A")]
        )
        np.testing.assert_allclose(change, trained - start, atol=2e-5)
    assert any("doubled" in warning for warning in adapter.warnings)


def test_an_adapter_that_was_not_trained_changes_nothing(tmp_path: Path) -> None:
    weights = Weights()
    tensors = dict(TENSORS)
    for layer in range(BASE.num_layers):
        for module in MODULES:
            q, r = np.linalg.qr(weights.values[layer, module])
            tensors[tensor_name(layer, module, "A")] = r[:4]
            tensors[tensor_name(layer, module, "B")] = q[:, :4]
    _, changes = do_import(tmp_path, config_of("olora"), tensors, weights)
    assert all(np.abs(change).max() < 1e-5 for change in changes.values())


def test_a_b_of_zeros_is_not_said_to_change_nothing(tmp_path: Path) -> None:
    name = tensor_name(1, "up_proj", "B")
    tensors = {**TENSORS, name: np.zeros_like(TENSORS[name])}
    adapter, changes = do_import(tmp_path, config_of("pissa"), tensors, Weights())
    assert np.abs(changes[1, "up_proj"]).max() > 0.1
    assert not any("zero" in warning for warning in adapter.warnings)


def test_singular_values_too_near_to_be_told_apart(tmp_path: Path) -> None:
    weights, at = Weights(), (2, "up_proj")
    u, s, vh = np.linalg.svd(weights.values[at].astype(np.float64), full_matrices=False)
    s[4] = s[3] * (1 - 1e-7)
    weights.values[at] = ((u * s) @ vh).astype(np.float32)
    said = refusal(tmp_path, config_of("pissa"), TENSORS, weights)
    assert module_name(*at) in said and "not clear" in said and "rank 4" in said
    # Of three vectors nothing is unclear: the fourth and the fifth are both left.
    fewer = {"rank_pattern": {"up_proj": 3}}
    tensors = TENSORS | make_tensors(BASE, modules=("up_proj",), rank=3)
    do_import(tmp_path, config_of("pissa", **fewer), tensors, weights)
    do_import(tmp_path, config_of("olora"), TENSORS, weights)


def test_first_columns_that_depend_on_each_other(tmp_path: Path) -> None:
    weights, at = Weights(), (0, "o_proj")
    weights.values[at][:, 3] = weights.values[at][:, 1]
    said = refusal(tmp_path, config_of("olora"), TENSORS, weights)
    assert module_name(*at) in said and "not clear" in said
    assert "path_initial_model_for_weight_conversion" in said
    do_import(tmp_path, config_of("pissa"), TENSORS, weights)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_cannot_be_computed_again(
    tmp_path: Path, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, config = Weights(), config_of(init)
    quantized = msgspec.structs.replace(BASE, quantized=True)
    assert "quantized" in refusal(tmp_path, config, TENSORS, weights, quantized)
    small = msgspec.structs.replace(BASE, max_rank=7)
    tensors = make_tensors(BASE, layers=(1,))
    one = make_config(init_lora_weights=init, target_modules=["q_proj"], layers_to_transform=[1])
    tensors = {name: t for name, t in tensors.items() if "q_proj" in name}
    said = refusal(tmp_path, one, tensors, weights, small)
    assert "rank 8 (4, twice" in said and "up to 7" in said
    do_import(tmp_path, one, tensors, weights, msgspec.structs.replace(BASE, max_rank=8))
    monkeypatch.setattr(residual, "MAX_WORK", 33.0**3 - 1)
    if init == "pissa":
        assert "too long" in refusal(tmp_path, one, tensors, weights)
    else:
        do_import(tmp_path, one, tensors, weights)


def test_lm_head_is_refused(tmp_path: Path) -> None:
    base = msgspec.structs.replace(BASE, vocab_size=19)
    tensors = make_tensors(base, modules=("q_proj",))
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 33), "<f4")
    tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((19, 4), "<f4")
    config = make_config(init_lora_weights="olora", target_modules=["q_proj", "lm_head"])
    assert "lm_head" in refusal(tmp_path, config, tensors, Weights(), base)
