"""Rotary tables against transformers' own rotary module, bit for bit where it computes alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux.model.architecture import parse_architecture
from loramux.model.layers.rotary import rotary_tables

LENGTH = 300

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 75},
    "yarn_without_original": {"rope_type": "yarn", "factor": 2.5},
    "yarn_tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn_attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5},
    # all dimensions end up on one side of the ramp: its ends coincide
    "yarn_narrow": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2},
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [4, 16, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_are_those_of_transformers(scaling: str, head_dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=LENGTH,
        rope_parameters=SCALINGS[scaling] | {"rope_theta": theta},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    rope = parse_architecture(config.to_dict(), {}).rope
    ours = rotary_tables(rope, head_dim, LENGTH)
    assert ours[0].shape == (LENGTH, head_dim // 2)
    assert torch.equal(ours[0], cos[0, :, : head_dim // 2])
    assert torch.equal(ours[1], sin[0, :, : head_dim // 2])


def test_the_scalings_differ() -> None:
    """The comparison above can only notice an ignored kind if the kinds differ."""
    from transformers import LlamaConfig

    tables = set()
    for scaling in SCALINGS.values():
        config = LlamaConfig(
            head_dim=16,
            max_position_embeddings=LENGTH,
            rope_parameters=scaling | {"rope_theta": 10000.0},
        )
        cos, _ = rotary_tables(parse_architecture(config.to_dict(), {}).rope, 16, LENGTH)
        tables.add(cos.numpy().tobytes())
    # dynamic is the default up to the trained length
    assert len(tables) == len(SCALINGS) - 1
