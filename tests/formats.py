"""Adapters of every format PEFT writes and we serve, made by PEFT with random trained values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import tiny

ALL = list(tiny.MODULES)

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8}),
    "rslora": ("LoraConfig", {"r": 8, "use_rslora": True}),
    "patterns": (
        "LoraConfig",
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 24.0}},
    ),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "dora_some": (
        "LoraConfig",
        {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "lora_bias": ("LoraConfig", {"r": 8, "lora_bias": True}),
    "bias_all": ("LoraConfig", {"r": 8, "bias": "all", "target_modules": ["v_proj", "up_proj"]}),
    "dora_bias_all": ("LoraConfig", {"r": 8, "bias": "all", "use_dora": True}),
    "fan_in_fan_out": ("LoraConfig", {"r": 8, "fan_in_fan_out": True}),
    "one_layer": ("LoraConfig", {"r": 8, "layers_to_transform": [1]}),
    "embeddings": ("LoraConfig", {"r": 8, "target_modules": [*ALL, "embed_tokens"]}),
    "head": ("LoraConfig", {"r": 8, "target_modules": ["q_proj", "lm_head"]}),
    "dora_head": (
        "LoraConfig",
        {"r": 4, "use_dora": True, "target_modules": ["v_proj", "lm_head"]},
    ),
    "saved_embeddings": ("LoraConfig", {"r": 8, "modules_to_save": ["embed_tokens"]}),
    "saved_head": ("LoraConfig", {"r": 8, "modules_to_save": ["lm_head"]}),
    "saved_norms": (
        "LoraConfig",
        {"r": 8, "modules_to_save": ["input_layernorm", "post_attention_layernorm", "model.norm"]},
    ),
    "tokens": ("LoraConfig", {"r": 8, "trainable_token_indices": [5, 319, 40]}),
    "adalora": ("AdaLoraConfig", {"init_r": 8, "target_r": 4, "total_step": 10}),
    "vera": ("VeraConfig", {"r": 16, "save_projection": True}),
    "miss": ("MissConfig", {"r": 8}),
    "miss_uneven": ("MissConfig", {"r": 6}),
    "miss_mini": ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "ia3": ("IA3Config", {}),
    "ia3_outputs": (
        "IA3Config",
        {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "feedforward_modules": []},
    ),
}
"""By name: PEFT's config class and what it is given beside the usual."""

_SIZES = {
    "lora_B": 0.1,
    "lora_E": 1.0,
    "vera_lambda_b": 1.5,
    "vera_lambda_d": 1.0,
    "miss_block": 0.15,
}


def write(directory: Path, model_dir: Path, name: str, *, seed: int = 0) -> Path:
    """Save the adapter ``name`` of FORMATS for a model, every trained value random."""
    import peft
    import torch

    kind, fields = FORMATS[name]
    usual: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ALL}
    if kind == "IA3Config":
        usual["target_modules"] = ["k_proj", "v_proj", "down_proj"]
        usual["feedforward_modules"] = ["down_proj"]
    if kind in ("LoraConfig", "AdaLoraConfig"):
        usual["lora_alpha"] = 16
    config = getattr(peft, kind)(**{**usual, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on what we test on purpose
        model = peft.get_peft_model(tiny._load(model_dir), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = _trained(parameter_name, parameter.data, noise)
        model.save_pretrained(str(directory))
    return directory


def _trained(name: str, start: Any, noise: Any) -> Any:
    if "magnitude" in name or "ia3_l" in name:
        return start * (1 + 0.3 * noise)
    if "modules_to_save" in name or "trainable_tokens" in name:
        return start + 0.3 * start.std() * noise if "norm" not in name else start + 0.3 * noise
    if name.endswith("bias") or "lora_B.default.bias" in name:
        return start + 0.3 * noise
    for part, size in _SIZES.items():
        if part in name:
            return size * noise
    return noise * start.shape[-1] ** -0.5


def write_sum(
    directory: Path, model_dir: Path, adapters: Mapping[str, Path], weights: Sequence[float]
) -> Path:
    """PEFT's own sum of several LoRA adapters, as one adapter of all their ranks."""
    import peft

    first, *others = adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(
            tiny._load(model_dir), str(adapters[first]), adapter_name=first
        )
        for name in others:
            model.load_adapter(str(adapters[name]), adapter_name=name)
        model.add_weighted_adapter(list(adapters), list(weights), "sum", combination_type="cat")
        model.save_pretrained(str(directory), selected_adapters=["sum"])
    return directory / "sum"
