"""Tables of rotary positions: cos and sin for every position a model may see.

Frequencies are computed in float32 in the order transformers computes them, so that both round
alike; a float64 table would be better numbers and a worse match.
"""

from __future__ import annotations

import math

import torch

from loramux.model.scaling import Rope


def rotary_tables(
    rope: Rope, head_dim: int, max_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cos, sin)``, float32 ``[max_positions, head_dim / 2]``, times the attention factor."""
    angles = torch.arange(max_positions).float()[:, None] * frequencies(rope, head_dim)
    return angles.cos().mul_(rope.attention_factor), angles.sin().mul_(rope.attention_factor)


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of every pair of a head: float32 ``[head_dim / 2]``."""
    wave = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    match rope.kind:
        case "default" | "dynamic":
            # up to the trained length, beyond which no request goes, dynamic NTK is the default
            return 1.0 / wave
        case "linear":
            return 1.0 / wave / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / wave)
        case "yarn":
            return _yarn(rope, wave)
    raise AssertionError(rope.kind)


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves slowed by the factor, short ones kept, a blend in between."""
    turns = rope.original_max_positions / (2 * math.pi / plain)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - blend) * plain / rope.factor + blend * plain
    wavelength = 2 * math.pi / plain
    slow = wavelength > rope.original_max_positions / rope.low_freq_factor
    fast = wavelength < rope.original_max_positions / rope.high_freq_factor
    return torch.where(slow, plain / rope.factor, torch.where(fast, plain, mixed))


def _yarn(rope: Rope, wave: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv 2309.00071), "NTK by parts": a ramp over the dimensions."""
    dim = 2 * wave.numel()

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns over the original context."""
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    ramp = ((torch.arange(wave.numel()).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wave) * (1 - kept) + 1.0 / wave * kept
