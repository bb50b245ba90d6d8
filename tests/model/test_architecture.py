"""config.json in, maths out; what is not implemented is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux.errors import ConfigError
from loramux.model.architecture import Architecture, parse_architecture, read_architecture
from tests import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 8,
}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 2,
}
QWEN3 = QWEN2 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def parse(config: dict[str, Any], **generation: Any) -> Architecture:
    return parse_architecture(config, generation)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_a_released_config_is_read_as_it_is() -> None:
    # the fields of a released 135M Llama-lineage checkpoint, odd ones included
    config = {
        "_name_or_path": "somewhere/checkpoints/final",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    }
    architecture = parse(config, eos_token_id=[2, 0])
    assert architecture.head_dim == 64
    assert architecture.tie_embeddings
    assert architecture.windows == (0,) * 30
    assert architecture.rope.theta == 100000
    assert architecture.eos_token_ids == (2, 0)
    assert architecture.checkpoint_dtype == "bfloat16"
    assert architecture.widths == {
        "q_proj": (576, 576),
        "k_proj": (576, 192),
        "v_proj": (576, 192),
        "o_proj": (576, 576),
        "gate_proj": (576, 1536),
        "up_proj": (576, 1536),
        "down_proj": (1536, 576),
    }


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3])
def test_both_spellings_mean_the_same(rope: dict[str, Any]) -> None:
    old = LLAMA | {"rope_scaling": rope if "factor" in rope else None}
    new = without(LLAMA, "rope_theta", "rope_scaling", "torch_dtype") | {
        "rope_parameters": rope | {"rope_theta": 500000.0},
        "dtype": "bfloat16",
    }
    assert parse(old) == parse(new)
    # releases in between write both
    assert parse(old | new) == parse(old)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_what_transformers_writes_is_read(checkpoint: Callable[..., Path], arch: tiny.Arch) -> None:
    from transformers import AutoConfig

    directory = checkpoint(arch)
    theirs, ours = AutoConfig.from_pretrained(directory), read_architecture(directory)
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.eos_token_ids == (tiny.EOS, tiny.IM_END)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == (arch == "llama_mha_tied")
    assert (ours.qkv_bias, ours.o_bias) == (arch == "qwen2", False)
    assert ours.qk_norm == (arch == "qwen3")
    assert set(ours.windows) == {8 if arch == "mistral" else 0}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MISTRAL, (8, 8, 8, 8)),
        (MISTRAL | {"sliding_window": None}, (0, 0, 0, 0)),
        (QWEN2, (0, 0, 0, 0)),
        (QWEN2 | {"use_sliding_window": True}, (0, 0, 8, 8)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": None}, (0, 0, 0, 0)),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 28}, (0, 0, 0, 0)),
        (
            QWEN3
            | {
                "use_sliding_window": True,
                "layer_types": [
                    "sliding_attention",
                    "full_attention",
                    "full_attention",
                    "sliding_attention",
                ],
            },
            (8, 0, 0, 8),
        ),
    ],
)
def test_windows(config: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert parse(config).windows == windows


def test_biases_by_family() -> None:
    biased = parse(LLAMA | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert parse(LLAMA | {"mlp_bias": True}).mlp_bias
    assert (parse(QWEN2).qkv_bias, parse(QWEN2).o_bias) == (True, False)
    assert (parse(QWEN3).qkv_bias, parse(QWEN3).qk_norm) == (False, True)
    assert parse(QWEN3 | {"attention_bias": True}).o_bias


def test_yarn_stretches_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert parse(LLAMA | {"rope_scaling": yarn}).context_length == 1024
    stated = LLAMA | {"rope_scaling": yarn, "max_position_embeddings": 2048}
    assert parse(stated).context_length == 2048
    assert parse(LLAMA | {"rope_scaling": LLAMA3}).context_length == 256
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert parse(LLAMA | {"rope_scaling": dynamic}).context_length == 256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"embedding_multiplier": 0}, "embedding_multiplier"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": "320"}, "vocab_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_scaling": [4]}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "rope_scaling.factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "rope_scaling.high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 4}}, "rope_scaling.beta_fast"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 2.0}},
            "rope_scaling.factor",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(LLAMA | change)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (without(MISTRAL, "sliding_window"), "sliding_window"),
        (without(MISTRAL, "num_key_value_heads"), "num_key_value_heads"),
        (MISTRAL | {"attention_bias": True}, "attention_bias"),
        (without(QWEN3, "head_dim"), "head_dim"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        (QWEN2 | {"layer_types": ["full_attention"] * 3}, "layer_types"),
        (QWEN2 | {"layer_types": ["linear_attention"] * 4}, "layer_types"),
        (QWEN2 | {"use_mrope": True}, "use_mrope"),
    ],
)
def test_families_refuse_what_is_not_theirs(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(config)


@pytest.mark.parametrize("name", [name for name in LLAMA if name.startswith(("hid", "num", "max"))])
def test_a_missing_field_is_named_unless_it_has_a_meaning(name: str) -> None:
    config = without(LLAMA, name)
    if name in ("hidden_act", "num_key_value_heads"):
        assert parse(config).num_kv_heads in (2, 4)
    else:
        with pytest.raises(ConfigError, match=name):
            parse(config)


def test_every_problem_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LLAMA | {"hidden_act": "relu", "vocab_size": 0, "some_scale": 2.0})
    for name in ("hidden_act", "vocab_size", "some_scale"):
        assert name in caught.value.message


def test_fields_that_hold_nothing_are_let_pass() -> None:
    nothing: dict[str, Any] = {
        "quantization_config": None,
        "new_flag": False,
        "adapters": [],
        "extra": {},
    }
    assert parse(LLAMA | nothing) == parse(LLAMA)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_architecture(tmp_path)
