"""PEFT as the oracle: tiny models with real adapters, saved by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from loramux.wire import BaseDescription

torch.set_num_threads(1)


def tiny_llama(base: BaseDescription, *, bare: bool = False) -> PreTrainedModel:
    """A random Llama of the base's shapes (head_dim 8); ``bare``: without its lm_head."""
    hidden, q = base.widths["q_proj"]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=base.widths["gate_proj"][1],
        num_hidden_layers=base.num_layers,
        num_attention_heads=q // 8,
        num_key_value_heads=base.widths["k_proj"][1] // 8,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaModel(config) if bare else LlamaForCausalLM(config)


def save_peft_adapter(
    folder: Path,
    base: BaseDescription,
    *,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
    **lora: Any,
) -> PeftModel:
    """Save a LoRA with random A and B as PEFT does; the PEFT model it was saved from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on what we test on purpose
        model = get_peft_model(tiny_llama(base, bare=bare), LoraConfig(**lora))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model


def load_peft_adapter(folder: Path, base: BaseDescription) -> PeftModel:
    """The adapter in a folder as PEFT reads it. (Half-precision weights come back as float32.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(tiny_llama(base), folder)
