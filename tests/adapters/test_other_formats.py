"""LoRA-XS, S2FT and the biases of formats that are not LoRA: taken whole, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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

from loramux.adapters import pack
from loramux.adapters.canonical import CanonicalAdapter, widen
from loramux.adapters.formats import import_adapter
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid
from loramux.wire import TABLE_MODULES, BaseDescription

BASE = base_description(hidden=33, inter=47, heads=5, kv_heads=1, head_dim=7)
Q0A, V2B = tensor_name(0, "q_proj", "A"), tensor_name(2, "v_proj", "B")


class Biases:
    """A base with biases where Qwen2 has them."""

    def blocks(self, layer: int, module: str) -> Iterator[Any]:
        raise AssertionError(f"{module} of layer {layer} was read")

    def bias(self, layer: int, module: str) -> Any:
        """Ones in q, k and v."""
        width = BASE.widths[module][1]
        return np.ones(width, np.float32) if module in ("q_proj", "k_proj", "v_proj") else None


def do_import(
    folder: Path, config: dict[str, Any], tensors: Tensors, base: BaseDescription = BASE
) -> tuple[CanonicalAdapter, dict[tuple[int, str], Any]]:
    """The adapter, and what it adds to each weight."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    with open(path, "rb") as file:
        config = json.loads(json.dumps(config))
        adapter = import_adapter(config, read_tensors(file), base, Biases())
        changes = {}
        for pair in (pair.folded() for pair in adapter.pairs):
            a, b = (widen(m.read(), m.dtype).astype(np.float64) for m in (pair.a, pair.b))
            assert a.shape == pair.a.shape and b.shape == pair.b.shape
            changes[pair.layer, pair.module] = pair.scale * b @ a
    return adapter, changes


def refusal(*args: Any) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        do_import(*args)
    return caught.value


def said(error: AdapterInvalid, named: str) -> bool:
    return any(named in problem for problem in error.problems)


def r_name(layer: int, module: str) -> str:
    return f"base_model.model.{module_name(layer, module)}.default_lora_latent_mapping.weight"


def lora_xs() -> Tensors:
    rng = np.random.default_rng(1)
    tensors = make_tensors(BASE)
    for layer in range(BASE.num_layers):
        for module in ("q_proj", "v_proj"):
            tensors[r_name(layer, module)] = rng.standard_normal((4, 4)).astype("<f4")
    return tensors


@pytest.mark.parametrize("spelling", [".default_lora", "_lora"])
def test_lora_xs_is_the_product_of_all_three(tmp_path: Path, spelling: str) -> None:
    tensors = lora_xs()
    ours = {name.replace(".default_lora", spelling): t for name, t in tensors.items()}
    adapter, changes = do_import(tmp_path, make_config(), ours)
    for (layer, module), change in changes.items():
        a, b = (tensors[tensor_name(layer, module, s)].astype(np.float64) for s in "AB")
        want = 2 * b @ tensors[r_name(layer, module)].astype(np.float64) @ a
        np.testing.assert_allclose(change, want, atol=1e-4)
    assert adapter.warnings == ()


def test_an_r_of_zeros_is_told(tmp_path: Path) -> None:
    tensors = lora_xs()
    tensors[r_name(1, "q_proj")][:] = 0
    adapter, _ = do_import(tmp_path, make_config(), tensors)
    assert any("1 of 6" in warning for warning in adapter.warnings)


Spoil = Callable[[Tensors], Any]
BAD_XS: dict[str, tuple[dict[str, Any], Spoil, str]] = {
    "no A": ({}, lambda t: t.pop(Q0A), "save lora_A and lora_B beside it"),
    "no B": ({}, lambda t: t.pop(V2B), "save lora_A and lora_B beside it"),
    "neither": (
        {},
        lambda t: [t.pop(n) for n in (Q0A, tensor_name(0, "q_proj", "B"))],
        r_name(0, "q_proj"),
    ),
    "no R in the last module": (
        {},
        lambda t: t.pop(r_name(2, "v_proj")),
        f"{module_name(2, 'v_proj')} has no lora_latent_mapping",
    ),
    "R of another rank": (
        {},
        lambda t: t.update({r_name(0, "q_proj"): np.ones((5, 4), "<f4")}),
        "[4, 4]",
    ),
    "R is not finite": ({}, lambda t: t[r_name(0, "q_proj")].fill(np.nan), "NaN"),
    "with DoRA": ({"use_dora": True}, lambda t: None, "LoRA-XS"),
    "with biases of B": ({"lora_bias": True}, lambda t: None, "LoRA-XS"),
    "of embeddings": (
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        lambda t: t.update(
            {
                "base_model.model.model.embed_tokens.default_lora_latent_mapping.weight": np.ones(
                    (4, 4), "<f4"
                )
            }
        ),
        "of embed_tokens is not defined",
    ),
    "R of no module": (
        {},
        lambda t: t.update({r_name(0, "q_proj").replace("q_proj", "c_proj"): np.ones((4, 4))}),
        "c_proj",
    ),
}


@pytest.mark.parametrize("case", BAD_XS)
def test_lora_xs_that_cannot_be_served(tmp_path: Path, case: str) -> None:
    fields, spoil, named = BAD_XS[case]
    tensors = lora_xs()
    spoil(tensors)
    tensors = {name: values.astype("<f4") for name, values in tensors.items()}
    error = refusal(tmp_path, make_config(**fields), tensors)
    assert said(error, named), error.problems


def s2ft(*modules: str, layers: tuple[int, ...] = (0, 2)) -> tuple[dict[str, Any], Tensors]:
    """Three channels a module, the last one among them, in no order."""
    rng = np.random.default_rng(2)
    indices, tensors = {}, {}
    for layer in layers:
        for module in modules:
            width_in, width_out = BASE.widths[module]
            inputs = module in ("o_proj", "down_proj")
            width = width_in if inputs else width_out
            shape = (width_out, 3) if inputs else (3, width_in)
            indices[module_name(layer, module)] = [width - 1, 0, 2]
            name = f"base_model.model.{module_name(layer, module)}.s2_delta"
            tensors[name] = rng.standard_normal(shape).astype("<f4")
    return {"peft_type": "S2FT", "s2_indices": indices}, tensors


def test_s2ft_changes_the_channels_it_names(tmp_path: Path) -> None:
    config, tensors = s2ft(*BASE.widths)
    adapter, changes = do_import(tmp_path, config, tensors)
    assert len(changes) == 14 and {pair.rank for pair in adapter.pairs} == {3}
    for (layer, module), change in changes.items():
        delta = tensors[f"base_model.model.{module_name(layer, module)}.s2_delta"]
        want = np.zeros(BASE.widths[module][::-1])
        channels = config["s2_indices"][module_name(layer, module)]
        if module in ("o_proj", "down_proj"):
            want[:, channels] = delta
        else:
            want[channels] = delta
        np.testing.assert_array_equal(change, want)


def test_s2ft_without_pefts_wrapper(tmp_path: Path) -> None:
    config, tensors = s2ft("v_proj")
    bare = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    config = {**config, "base_model_name_or_path": "some/base"}
    assert len(do_import(tmp_path, config, bare)[1]) == 2


O2, DOWN0 = module_name(2, "o_proj"), module_name(0, "down_proj")
BAD_S2FT: dict[str, tuple[Callable[[dict[str, Any], Tensors], Any], str]] = {
    "no indices": (lambda c, t: c.pop("s2_indices"), "s2_indices is missing"),
    "indices in a list": (lambda c, t: c.update(s2_indices=[1, 2]), "s2_indices is missing"),
    "no indices of a module": (lambda c, t: c["s2_indices"].pop(O2), "do not name its module"),
    "indices of nothing": (
        lambda c, t: c["s2_indices"].update({"model.layers.1.mlp.up_proj": [1]}),
        "'model.layers.1.mlp.up_proj', which has no s2_delta",
    ),
    "twice the same": (lambda c, t: c["s2_indices"].update({O2: [1, 1, 2]}), O2),
    "beyond the last": (lambda c, t: c["s2_indices"].update({O2: [1, 2, 35]}), "from 0 to 34"),
    "negative": (lambda c, t: c["s2_indices"].update({O2: [1, 2, -1]}), "from 0 to 34"),
    "outputs, not inputs": (lambda c, t: c["s2_indices"].update({DOWN0: [0, 1, 47]}), "to 46"),
    "none": (lambda c, t: c["s2_indices"].update({O2: []}), "not a list of channel"),
    "true": (lambda c, t: c["s2_indices"].update({O2: [0, True, 2]}), "not a list of channel"),
    "one too few": (lambda c, t: c["s2_indices"].update({O2: [0, 1]}), "[33, 2]"),
    "the other side": (
        lambda c, t: t.update({f"base_model.model.{O2}.s2_delta": np.ones((3, 35), "<f4")}),
        "[33, 3]",
    ),
    "lm_head": (
        lambda c, t: (
            t.update({"base_model.model.lm_head.s2_delta": np.ones((3, 33), "<f4")}),
            c["s2_indices"].update(lm_head=[0, 1, 2]),
        ),
        "of lm_head is not served",
    ),
    "a norm": (
        lambda c, t: (
            t.update({"model.layers.0.input_layernorm.s2_delta": np.ones((1, 33), "<f4")}),
            c["s2_indices"].update({"model.layers.0.input_layernorm": [0]}),
        ),
        "of input_layernorm is not served",
    ),
    "LoRA beside it": (lambda c, t: t.update({Q0A: np.ones((4, 33), "<f4")}), Q0A),
    "target modules": (lambda c, t: c.update(target_modules=["o_proj"]), "target_modules"),
    "some layers": (lambda c, t: c.update(layers_to_transform=[0]), "layers_to_transform"),
    "an unknown field": (lambda c, t: c.update(s2_scale=2), "s2_scale"),
    "biases": (lambda c, t: c.update(bias="all"), "bias"),
    "not finite": (lambda c, t: t[f"base_model.model.{O2}.s2_delta"].fill(np.inf), "NaN"),
}


@pytest.mark.parametrize("case", BAD_S2FT)
def test_s2ft_that_cannot_be_served(tmp_path: Path, case: str) -> None:
    spoil, named = BAD_S2FT[case]
    config, tensors = s2ft("o_proj", "down_proj")
    spoil(config, tensors)
    error = refusal(tmp_path, config, tensors)
    assert said(error, named), error.problems


def test_more_channels_than_the_servers_rank(tmp_path: Path) -> None:
    config, tensors = s2ft("q_proj", layers=(1,))
    do_import(tmp_path, config, tensors, msgspec.structs.replace(BASE, max_rank=3))
    error = refusal(tmp_path, config, tensors, msgspec.structs.replace(BASE, max_rank=2))
    assert error.code == "rank_too_large"
    assert said(error, "rank 3; this server takes up to 2")


def other_format(kind: str) -> tuple[dict[str, Any], Tensors]:
    """The least adapter of a format, in v_proj of layer 1 alone."""
    at = f"base_model.model.{module_name(1, 'v_proj')}"
    width_in, width_out = BASE.widths["v_proj"]
    config: dict[str, Any] = {
        "peft_type": kind,
        "target_modules": ["v_proj"],
        "layers_to_transform": [1],
    }
    ones = lambda *shape: np.ones(shape, "<f4")  # noqa: E731
    if kind == "ADALORA":
        return {**config, "init_r": 4, "lora_alpha": 8}, {
            f"{at}.lora_A": ones(2, width_in),
            f"{at}.lora_B": ones(width_out, 2),
            f"{at}.lora_E": ones(2, 1),
        }
    if kind == "VERA":
        return {**config, "r": 3}, {
            f"{at}.vera_lambda_b": ones(width_out),
            f"{at}.vera_lambda_d": ones(3),
            "base_model.vera_A": ones(3, width_in),
            "base_model.vera_B": ones(width_out, 3),
        }
    return {**config, "r": 3}, {f"{at}.miss_block": ones(3, width_out)}


OWN = {"ADALORA": "lora_only", "VERA": "vera_only", "MISS": "MiSS_only"}


@pytest.mark.parametrize("kind", OWN)
def test_biases_of_every_format(tmp_path: Path, kind: str) -> None:
    config, tensors = other_format(kind)
    assert do_import(tmp_path, config, tensors)[0].vectors == ()
    own = f"base_model.model.{module_name(1, 'v_proj')}.base_layer.bias"
    with_bias = {**tensors, own: np.full(7, 3, "<f4")}
    adapter, _ = do_import(tmp_path, {**config, "bias": OWN[kind]}, with_bias)
    (vector,) = adapter.vectors
    assert (vector.layer, vector.module, vector.kind) == (1, "v_proj", "shift")
    assert vector.values.tolist() == [2.0] * 7
    for bias, given, named in (
        ("none", with_bias, "no bias was trained"),
        (OWN[kind], tensors, "the file does not hold it"),
        ("all", with_bias, module_name(0, "q_proj")),
        ("ia3_only", with_bias, f"none, all or {OWN[kind]}"),
        (OWN[kind], {**tensors, own: np.ones(8, "<f4")}, "[7]"),
    ):
        error = refusal(tmp_path, {**config, "bias": bias}, given)
        assert said(error, named), error.problems


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2), (1,)])
def test_veras_basis_is_in_the_pool_once(tmp_path: Path, layers: tuple[int, ...]) -> None:
    """A for each width of inputs; of each module only its own B. Layers end where they did."""
    rng, rank = np.random.default_rng(3), 5
    shared = {"A": rng.standard_normal((rank, 47)), "B": rng.standard_normal((47, rank))}
    tensors = {f"base_model.vera_{side}": v.astype("<f4") for side, v in shared.items()}
    for layer in layers:
        for module, (_, width_out) in BASE.widths.items():
            at = f"base_model.model.{module_name(layer, module)}"
            tensors[f"{at}.vera_lambda_b"] = rng.standard_normal(width_out).astype("<f4")
            tensors[f"{at}.vera_lambda_d"] = rng.standard_normal(rank).astype("<f4")
    config = {
        "peft_type": "VERA",
        "r": rank,
        "target_modules": list(BASE.widths),
        "layers_to_transform": list(layers),
    }
    path = tmp_path / "weights"
    path.write_bytes(safetensors_bytes(tensors))
    with open(path, "rb") as file:
        adapter = import_adapter(config, read_tensors(file), BASE, Biases())
        layout = pack.pack(adapter, BASE, "d" * 64, tmp_path / "packed" / "it")
    packed = pack.read_header(tmp_path / "packed" / "it")
    assert pack.verify_payload(packed)
    stream = np.fromfile(packed.path, "<f4", offset=packed.payload_offset)
    padded = {width: -(-width // 16) * 16 for pair in BASE.widths.values() for width in pair}
    widths_out = [width_out for _, width_out in BASE.widths.values()]
    once = sum(padded[width] for width in {width_in for width_in, _ in BASE.widths.values()})
    own = len(layers) * sum(padded[width] for width in widths_out)
    assert stream.size == layout.num_elems == rank * (once + own)

    needs = np.zeros(BASE.num_layers, np.int64)
    for pair in adapter.pairs:
        at = pair.layer, TABLE_MODULES.index(pair.module)
        halves = []
        for offset, width in zip(
            (packed.a_offset, packed.b_offset), BASE.widths[pair.module], strict=True
        ):
            start, end = int(offset[at]), int(offset[at]) + rank * padded[width]
            halves.append(stream[start:end].reshape(rank, -1)[:, :width])
            needs[pair.layer :] = np.maximum(needs[pair.layer :], end)
        a, b = halves
        name = f"base_model.model.{module_name(pair.layer, pair.module)}.vera_lambda"
        width_in, width_out = BASE.widths[pair.module]
        want = (tensors[f"{name}_b"][:, None] * shared["B"][:width_out]) @ (
            tensors[f"{name}_d"][:, None] * shared["A"][:, :width_in]
        )
        np.testing.assert_allclose(b.T @ a, want, atol=1e-4)
    assert packed.layer_ends().tolist() == needs.tolist()
