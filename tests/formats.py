"""Adapters of every format we serve, made by PEFT with random trained values.

What PEFT does not write is written here, with the model that the change makes of the base, summed
in float64, beside it (``merged/``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import tiny

if TYPE_CHECKING:
    import torch

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
    "pissa": ("LoraConfig", {"r": 8, "init_lora_weights": "pissa"}),
    "pissa_patterns": (
        "LoraConfig",
        {
            "r": 4,
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"up_proj": 5.0},
            "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        },
    ),
    "pissa_dora": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("LoraConfig", {"r": 8, "init_lora_weights": "olora"}),
    "olora_embeddings": (
        "LoraConfig",
        {
            "r": 3,
            "init_lora_weights": "olora",
            "use_rslora": True,
            "alpha_pattern": {"o_proj": 2.0},
            "target_modules": [*ALL, "embed_tokens"],
        },
    ),
    "lora_xs": ("LoRA-XS", {"r": 8}),
    "lora_xs_joined": ("LoRA-XS", {"r": 5, "use_rslora": True, "joined": True}),
    "s2ft": ("S2FT", {"n": 7}),
    "adalora": ("AdaLoraConfig", {"init_r": 8, "target_r": 4, "total_step": 10}),
    "adalora_bias": ("AdaLoraConfig", {"init_r": 8, "total_step": 10, "bias": "lora_only"}),
    "vera": ("VeraConfig", {"r": 16, "save_projection": True}),
    "vera_bias": ("VeraConfig", {"r": 16, "save_projection": True, "bias": "all"}),
    "miss": ("MissConfig", {"r": 8}),
    "miss_bias": ("MissConfig", {"r": 8, "bias": "MiSS_only", "target_modules": ["v_proj"]}),
    "miss_uneven": ("MissConfig", {"r": 6}),
    "miss_mini": ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "ia3": ("IA3Config", {}),
    "ia3_outputs": (
        "IA3Config",
        {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "feedforward_modules": []},
    ),
}
"""By name: PEFT's config class, or the name of a format PEFT has not, and what it is given beside
the usual."""

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
    if kind in ("LoRA-XS", "S2FT"):
        _write_foreign(directory, model_dir, name, seed)
        return directory
    usual: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ALL}
    if kind == "IA3Config":
        usual["target_modules"] = ["k_proj", "v_proj", "down_proj"]
        usual["feedforward_modules"] = ["down_proj"]
    if kind in ("LoraConfig", "AdaLoraConfig"):
        usual["lora_alpha"] = 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on what we test on purpose
        config = getattr(peft, kind)(**{**usual, **fields})
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


def _write_foreign(directory: Path, model_dir: Path, name: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    kind, fields = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    model = tiny._load(model_dir)
    linear = {n: m.weight for n, m in model.named_modules() if n.rpartition(".")[2] in ALL}
    write = _lora_xs if kind == "LoRA-XS" else _s2ft
    config, tensors, deltas = write(fields, linear, generator)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    for module, delta in deltas.items():
        linear[module].data = (linear[module].data.double() + delta).float()
    model.save_pretrained(directory / "merged")


Written = tuple[dict[str, Any], dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]


def _lora_xs(
    fields: dict[str, Any], linear: Mapping[str, torch.Tensor], generator: torch.Generator
) -> Written:
    import torch

    r = fields["r"]
    scale = 16 / r**0.5 if fields.get("use_rslora") else 16 / r
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": ALL}
    if fields.get("use_rslora"):
        config["use_rslora"] = True
    spelling = "_lora" if fields.get("joined") else ".default_lora"
    tensors, deltas = {}, {}
    for module, weight in linear.items():
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        a, b = vh[:r].contiguous(), (u[:, :r] * s[:r]).contiguous()
        latent = 0.3 * torch.randn(r, r, generator=generator)
        path = f"base_model.model.{module}"
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
        tensors[f"{path}{spelling}_latent_mapping.weight"] = latent
        deltas[module] = scale * b.double() @ latent.double() @ a.double()
    return config, tensors, deltas


def _s2ft(
    fields: dict[str, Any], linear: Mapping[str, torch.Tensor], generator: torch.Generator
) -> Written:
    import torch

    indices, tensors, deltas = {}, {}, {}
    for module, weight in linear.items():
        inputs = module.endswith(("o_proj", "down_proj"))
        channels = torch.randperm(weight.shape[inputs], generator=generator)[: fields["n"]]
        shape = (weight.shape[0], len(channels)) if inputs else (len(channels), weight.shape[1])
        change = 0.5 * torch.randn(shape, generator=generator)
        indices[module] = channels.tolist()
        tensors[f"base_model.model.{module}.s2_delta"] = change
        deltas[module] = torch.zeros(weight.shape, dtype=torch.float64)
        if inputs:
            deltas[module][:, channels] = change.double()
        else:
            deltas[module][channels] = change.double()
    return {"peft_type": "S2FT", "s2_indices": indices}, tensors, deltas


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
