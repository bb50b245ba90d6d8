"""What one forward pass is given: on the host, and as the kernels take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.attention import Pages
from loramux_kernels.lora import Runs


@dataclass(frozen=True)
class ModelInputs:
    """A ragged batch of T token rows, request after request.

    ``token_ids`` and ``positions`` are int64 ``[T]``. ``pages`` says where each request's KV lies,
    ``runs`` which rows wear which adapters; both count the same T rows. ``scored`` is int64
    ``[S]``: the rows whose logits are wanted, in the order they are wanted, and ``scored_rows`` the
    same on the host. All other tensors are on the model's device. ``before_layer`` is told each
    layer of a device before it is launched: there the device waits for adapters that are still
    arriving.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    pages: Pages
    runs: Runs
    scored: torch.Tensor
    scored_rows: npt.NDArray[np.int64]
    before_layer: Callable[[int], None] = lambda layer: None


@dataclass(frozen=True)
class StepArrays:
    """The same batch as the host builds it. ``alone[t]``: token row t is the only one of its
    request in this step. ``before_layer`` as in :class:`ModelInputs`."""

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    pages: Pages
    runs: Runs
    scored: npt.NDArray[np.int64]
    alone: npt.NDArray[np.bool_]
    before_layer: Callable[[int], None] = lambda layer: None

    def on_cpu(self) -> ModelInputs:
        """The batch for kernels that read the host's memory."""
        return ModelInputs(
            token_ids=torch.from_numpy(self.token_ids),
            positions=torch.from_numpy(self.positions),
            pages=self.pages,
            runs=self.runs,
            scored=torch.from_numpy(self.scored),
            scored_rows=self.scored,
            before_layer=self.before_layer,
        )
