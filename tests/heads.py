"""Medusa heads for tests: random ones, and ones that know how texts go on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_heads(
    path: Path,
    hidden: int,
    *,
    heads: int = 3,
    blocks: int = 1,
    vocab_size: int = 0,
    prefix: str = "",
    accuracy: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random heads, with output matrices of their own when there is a ``vocab_size``."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) / hidden**0.5).to(dtype)

    tensors = {}
    for j in range(heads):
        for i in range(blocks):
            tensors[f"{prefix}{j}.{i}.linear.weight"] = random(hidden, hidden)
            tensors[f"{prefix}{j}.{i}.linear.bias"] = random(hidden)
        if vocab_size:
            tensors[f"{prefix}{j}.{blocks}.weight"] = random(vocab_size, hidden)
    if accuracy is not None:
        tensors["accuracy"] = accuracy
    save_file(tensors, path)
    return tensors
