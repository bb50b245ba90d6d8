"""What one forward pass is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramux_kernels.attention import Pages
from loramux_kernels.lora import Runs


@dataclass(frozen=True)
class ModelInputs:
    """A ragged batch of T token rows, request after request.

    ``token_ids`` and ``positions`` are int64 ``[T]``. ``pages`` says where each request's KV lies,
    ``runs`` which rows wear which adapters; both count the same T rows. ``scored`` is int64
    ``[S]``: the rows whose logits are wanted, in the order they are wanted. All tensors are on the
    model's device. ``before_layer`` is told each layer of a device before it is launched: there the
    device waits for adapters that are still arriving.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    pages: Pages
    runs: Runs
    scored: torch.Tensor
    before_layer: Callable[[int], None] = lambda layer: None
