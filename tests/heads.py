"""Medusa heads for tests: random ones, and ones that know how texts go on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save, save_file


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


def saying(
    token_id: int, hidden: int, vocab_size: int, *, heads: int = 3, **more: torch.Tensor
) -> bytes:
    """A file of heads that say one token for ever, whatever they read: their blocks add a large
    constant, of which that token's row of the output matrix makes its logit. ``more`` takes the
    place of tensors, or joins them."""
    constant, output = torch.zeros(hidden), torch.zeros(vocab_size, hidden)
    constant[0], output[token_id, 0] = 1000.0, 1.0
    tensors = {}
    for j in range(heads):
        tensors[f"{j}.0.linear.weight"] = torch.zeros(hidden, hidden)
        tensors[f"{j}.0.linear.bias"] = constant.clone()
        tensors[f"{j}.1.weight"] = output.clone()
    return save({**tensors, **more})
