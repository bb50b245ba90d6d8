"""What cannot be served exactly is refused by name, all of it at once."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters.peft_files import (
    Tensors,
    base_description,
    import_files,
    make_config,
    make_tensors,
    module_name,
    safetensors_bytes,
    tensor_name,
)

from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import parse_config
from loramux.adapters.problems import MAX_LISTED
from loramux.adapters.safetensors_file import BLOCK_BYTES, read_tensors
from loramux.errors import AdapterInvalid
from loramux.wire import BaseDescription

BASE = base_description()
Q0A, V2B = tensor_name(0, "q_proj", "A"), tensor_name(2, "v_proj", "B")


def do_import(
    folder: Path, config: object, tensors: Tensors, base: BaseDescription = BASE
) -> CanonicalAdapter:
    """Through the bytes, as an upload comes."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    with open(path, "rb") as file:
        return import_files(parse_config(text), read_tensors(file), base)


def refusal(
    folder: Path, config: object, tensors: Tensors, base: BaseDescription = BASE
) -> AdapterInvalid:
    """The error of an import that must fail."""
    with pytest.raises(AdapterInvalid) as caught:
        do_import(folder, config, tensors, base)
    assert caught.value.problems and caught.value.status == 422
    return caught.value


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "convert_to_lora"),
    ({"peft_type": ["LORA"]}, "peft_type"),
    ({"peft_type": None}, "peft_type"),
    ({"bias": "some"}, "bias"),
    ({"use_dora": True}, "has no magnitude"),
    ({"use_dora": 1}, "use_dora"),
    ({"lora_bias": True}, "has no B bias"),
    ({"use_dora": True, "lora_bias": True}, "together"),
    ({"modules_to_save": ["lm_head"]}, "lm_head has no weight in the file"),
    ({"modules_to_save": ["o_proj"]}, "linear modules"),
    ({"modules_to_save": ["score"]}, "no module 'score'"),
    ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1, 2]}, "no rows of it"),
    ({"trainable_token_indices": [1, True]}, "not understood"),
    ({"trainable_token_indices": {"q_proj": [1]}}, "not understood"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"kasa_config": {"x": 1}}, "kasa_config"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    ({"init_lora_weights": "PiSSA"}, "init_lora_weights"),
    ({"init_lora_weights": "corda"}, "init_lora_weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ({"init_lora_weights": 1}, "init_lora_weights"),
    ({"a_field_of_tomorrow": True}, "a_field_of_tomorrow"),
    ({"a_field_of_tomorrow": 0}, "a_field_of_tomorrow"),
    ({"a_field_of_tomorrow": {"on": False}}, "a_field_of_tomorrow"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"use_rslora": "yes"}, "use_rslora"),
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": 4.0}, "r is 4.0"),
    ({"r": "4"}, "r is '4'"),
    ({"r": True}, "r is True"),
    ({"r": None}, "r is None"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_alpha": True}, "lora_alpha"),
    ({"lora_alpha": 10**4000}, "lora_alpha"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 4.0}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
    ({"rank_pattern": {str(i): 4 for i in range(5000)}}, "5000 keys"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": {"q_proj": 1}}, "target_modules"),
    ({"target_modules": ["q_proj", 3]}, "target_modules"),
    ({"target_modules": []}, "does not target it"),
    ({"target_modules": ["q_proj"]}, module_name(0, "v_proj")),
    ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "'fc1'"),
    ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "lm_head is targeted"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, module_name(1, "o_proj")),
    ({"exclude_modules": ["v_proj"]}, module_name(0, "v_proj")),
    ({"exclude_modules": 7}, "exclude_modules"),
    ({"layers_to_transform": [0, 1]}, module_name(2, "q_proj")),
    ({"layers_to_transform": [0, 1, 2, 3]}, "the base has 3 layers"),
    ({"layers_to_transform": "all"}, "layers_to_transform"),
    ({"layers_to_transform": [True]}, "layers_to_transform"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, "layers_pattern"),
]


@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS, ids=[str(f)[:50] for f, _ in BAD_FIELDS])
def test_a_config_field_that_cannot_be_honoured(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    error = refusal(tmp_path, make_config(**fields), make_tensors(BASE))
    assert any(named in problem for problem in error.problems), error.problems


def test_missing_fields(tmp_path: Path) -> None:
    error = refusal(tmp_path, {}, make_tensors(BASE))
    for name in ("peft_type", "r is", "lora_alpha", "target_modules"):
        assert any(name in problem for problem in error.problems)


def test_fields_that_change_nothing_are_taken_whatever_they_say(tmp_path: Path) -> None:
    config = make_config(
        base_model_name_or_path="http://169.254.169.254/",
        auto_mapping={"base_model_class": "x", "parent_library": "os"},
        megatron_core="os.path",
        revision="main",
        peft_version="99.0",
        task_type="CAUSAL_LM",
        lora_dropout=0.3,
        inference_mode=True,
        eva_config={"rho": 2.0},
        runtime_config={"ephemeral_gpu_offload": True},
        loftq_config={"loftq_bits": 4},
        corda_config={"cache_file": "/etc/passwd"},
        qalora_group_size=32,
        bias="none",
        use_dora=False,
        modules_to_save=[],
        a_field_of_tomorrow=None,
        another={},
        init_lora_weights="eva",
    )
    assert len(do_import(tmp_path, config, make_tensors(BASE)).pairs) == 6


Change = Callable[[Tensors], Any]


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def put(name: str, values: Any) -> Change:
    return lambda tensors: tensors.update({name: np.asarray(values)})


def poke(name: str, value: float) -> Change:
    """Set the very last element."""

    def change(tensors: Tensors) -> None:
        tensors[name].flat[-1] = value

    return change


ONES = np.ones((4, 4), "<f4")
BAD_TENSORS: dict[str, tuple[Change, str, str]] = {
    "A without B": (drop(V2B), "adapter_invalid", "lora_A without lora_B"),
    "B without A": (drop(Q0A), "adapter_invalid", "lora_B without lora_A"),
    "lm_head": (put("base_model.model.lm_head.lora_A.weight", ONES), "adapter_invalid", "lm_head"),
    "embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", ONES),
        "adapter_invalid",
        "embed_tokens has lora_A without lora_B",
    ),
    "saved module": (put("base_model.model.lm_head.weight", ONES), "adapter_invalid", "lm_head"),
    "DoRA": (
        put(Q0A.replace("lora_A.weight", "lora_magnitude_vector"), ONES[0]),
        "adapter_invalid",
        "does not say use_dora",
    ),
    "bias": (put(Q0A.replace("lora_A.weight", "bias"), ONES[0]), "adapter_invalid", "no bias was"),
    "lora bias": (put(V2B.replace("weight", "bias"), ONES[0]), "adapter_invalid", "lora_bias"),
    "norm": (
        put("base_model.model.model.norm.weight", ONES[0]),
        "adapter_invalid",
        "modules_to_save does not name it",
    ),
    "no such layer": (
        put(tensor_name(3, "q_proj", "A"), np.ones((4, 32), "<f4")),
        "adapter_invalid",
        "3 layers",
    ),
    "no such module": (
        put("base_model.model.model.layers.0.mlp.fc1.lora_A.weight", ONES),
        "adapter_invalid",
        "no such linear module",
    ),
    "module in the wrong block": (
        put("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", ONES),
        "adapter_invalid",
        "no such linear module",
    ),
    "layer with a leading zero": (
        put("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", ONES),
        "adapter_invalid",
        "no such linear module",
    ),
    "another wrapper": (
        put("base_model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight", ONES),
        "adapter_invalid",
        "language_model",
    ),
    "another adapter's name": (
        put(Q0A.replace("lora_A.weight", "lora_A.other.weight"), ONES),
        "adapter_invalid",
        "lora_A.other",
    ),
    "no LoRA at all": (put("hello", ONES), "adapter_invalid", "no weight of its format"),
    "one weight twice": (
        put(Q0A.replace("lora_A.", "lora_A.default."), np.ones((4, 32), "<f4")),
        "adapter_invalid",
        "given twice",
    ),
    "A of another base": (put(Q0A, np.ones((4, 64), "<f4")), "adapter_invalid", "[r, 32]"),
    "B of another base": (put(V2B, np.ones((32, 4), "<f4")), "adapter_invalid", "[16, r]"),
    "B transposed": (put(V2B, np.ones((4, 16), "<f4")), "adapter_invalid", "[16, r]"),
    "one dimension": (put(Q0A, np.ones(128, "<f4")), "adapter_invalid", "[r, 32]"),
    "three dimensions": (put(Q0A, np.ones((1, 4, 32), "<f4")), "adapter_invalid", "[r, 32]"),
    "A and B disagree": (put(V2B, np.ones((16, 5), "<f4")), "rank_mismatch", "A has rank 4"),
    "NaN, last element": (poke(V2B, np.nan), "non_finite", "NaN"),
    "infinity": (poke(Q0A, -np.inf), "non_finite", "NaN"),
    "1e30": (poke(Q0A, -1e30), "out_of_range", "65504"),
    "just beyond float16": (poke(V2B, 65505.0), "out_of_range", "65504"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    change, code, named = BAD_TENSORS[case]
    tensors = make_tensors(BASE)
    change(tensors)
    error = refusal(tmp_path, make_config(), tensors)
    assert error.code == code
    assert any(named in problem for problem in error.problems), error.problems


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("<f2", 0x7C00),
        ("<f2", 0x7E01),
        ("<f2", 0xFC00),
        ("<u2", 0x7F80),
        ("<u2", 0xFFC0),
        ("<f4", 0x7F800001),
    ],
)
def test_non_finite_values_of_every_dtype(tmp_path: Path, dtype: str, bits: int) -> None:
    tensors = make_tensors(BASE)
    forged = np.zeros(tensors[V2B].shape, "<u4" if dtype == "<f4" else "<u2")
    forged.flat[-1] = bits
    tensors[V2B] = forged.view(dtype)
    assert refusal(tmp_path, make_config(), tensors).code == "non_finite"


def test_values_up_to_the_limit_are_taken(tmp_path: Path) -> None:
    for dtype, bits in (("<f2", 0x7BFF), ("<u2", 0x477F), ("<f4", 0x477FE000)):
        tensors = make_tensors(BASE)
        forged = np.full(tensors[V2B].shape, bits, "<u4" if dtype == "<f4" else "<u2")
        tensors[V2B] = forged.view(dtype)
        do_import(tmp_path, make_config(), tensors)
    forged = np.full(tensors[V2B].shape, 0x4780, "<u2")  # 65536 in bfloat16
    assert refusal(tmp_path, make_config(), {**tensors, V2B: forged}).code == "out_of_range"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"r": 8}, "rank_mismatch"),
        ({"r": 10**9}, "rank_mismatch"),
        ({"r": 2**31}, "rank_mismatch"),
        ({"rank_pattern": {"v_proj": 3}}, "rank_mismatch"),
        ({"rank_pattern": {r"layers\.2\..*v_proj": 3}}, "rank_mismatch"),
        ({"lora_alpha": 1e308}, "out_of_range"),
        ({"lora_alpha": 1e-60}, "out_of_range"),
        ({"alpha_pattern": {r"layers\.2.*": 1e9}}, "out_of_range"),
    ],
)
def test_ranks_and_scales(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    assert refusal(tmp_path, make_config(**fields), make_tensors(BASE)).code == code


@pytest.mark.parametrize("text", ["NaN", "1e999", "-Infinity"])
def test_an_alpha_that_is_not_a_number(tmp_path: Path, text: str) -> None:
    config = json.dumps(make_config(lora_alpha=42)).replace("42", text).encode()
    refusal(tmp_path, config, make_tensors(BASE))


def test_a_rank_over_the_servers_cap(tmp_path: Path) -> None:
    base = base_description(max_rank=3)
    assert refusal(tmp_path, make_config(), make_tensors(base), base).code == "rank_too_large"
    do_import(tmp_path, make_config(), make_tensors(base), base_description(max_rank=4))


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"null",
        b"[]",
        b'{"r": 4',
        b'{"r": 4} x',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"r": "\xff"}',
        b'{"r": NaN}',
        b'{"r": 4, "r": 8}',
        b'{"x": {"y": 1, "y": 2}}',
        b'{"x": ' + b"[" * 30000 + b"]" * 30000 + b"}",
        b'{"x": ' + b'{"y":' * 30000 + b"1" + b"}" * 30001,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (1 << 20) + b"{}",
    ],
    ids=range(15),
)
def test_a_config_that_is_not_plain_json(config: bytes) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse_config(config)
    assert len(caught.value.message) < 300


def test_every_offender_is_listed(tmp_path: Path) -> None:
    tensors = make_tensors(BASE)
    for change, _, _ in (BAD_TENSORS[c] for c in ("lm_head", "bias", "DoRA", "NaN, last element")):
        change(tensors)
    tensors[Q0A] = np.ones((4, 31), "<f4")
    config = make_config(use_dora=True, bias="all", new_thing=3, lora_alpha=0)
    error = refusal(tmp_path, config, tensors)
    assert error.code == "adapter_invalid"
    for named in (
        "lm_head",
        "q_proj.bias",
        "lora_magnitude_vector",
        V2B,
        Q0A,
        "use_dora",
        "bias",
        "'new_thing'",
        "lora_alpha",
    ):
        assert sum(named in problem for problem in error.problems) >= 1, named


def test_a_long_list_of_offenders_is_cut_and_counted(tmp_path: Path) -> None:
    tensors = make_tensors(BASE) | {f"stray.{i}": np.ones(1, "<f4") for i in range(120)}
    error = refusal(tmp_path, make_config(), tensors)
    assert len(error.problems) == MAX_LISTED + 1
    assert error.problems[-1] == f"... and {120 - MAX_LISTED} more"
    assert "120 problems" in error.message


def test_names_in_errors_are_printable_and_bounded(tmp_path: Path) -> None:
    strange = "\ud800\n\x1b[31m" + "x" * 200
    tensors = make_tensors(BASE) | {strange: np.ones(1, "<f4")}
    error = refusal(tmp_path, make_config(**{"k" * 5000: 1}), tensors)
    for text in (*error.problems, error.message):
        assert text.isprintable() and len(text) < 400
        text.encode()


def test_a_rank_bomb_costs_no_memory(tmp_path: Path) -> None:
    config = make_config(r=10**9, rank_pattern={f"p{i}": 10**9 for i in range(100)})
    tensors = make_tensors(BASE)
    tracemalloc.start()
    try:
        assert refusal(tmp_path, config, tensors).code == "rank_mismatch"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_large_file_is_read_in_blocks(tmp_path: Path) -> None:
    base = base_description(hidden=1 << 18, inter=48, layers=1)
    tensors = make_tensors(base, rank=16, modules=("q_proj",))
    size = sum(t.nbytes for t in tensors.values())
    path = tmp_path / "w"
    path.write_bytes(safetensors_bytes(tensors))
    del tensors
    tracemalloc.start()
    try:
        with open(path, "rb") as file:
            config = make_config(r=16, target_modules=["q_proj"])
            import_files(config, read_tensors(file), base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 16 << 20 and peak < 5 * BLOCK_BYTES
