"""Host tables as a device sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Arrays = Mapping[str, npt.NDArray[Any]]


def mirror(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """One step's small arrays on ``device``: a single copy from pinned memory, never a sync.

    On the CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    ends = np.cumsum([-(-array.nbytes // 16) * 16 for array in arrays.values()]).tolist()
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    for start, array in zip([0, *ends], arrays.values(), strict=False):
        host[start : start + array.nbytes] = torch.from_numpy(array.reshape(-1).view(np.uint8))
    there = host.to(device, non_blocking=True)
    views = {}
    for start, (name, array) in zip([0, *ends], arrays.items(), strict=False):
        dtype = torch.from_numpy(array).dtype
        views[name] = there[start : start + array.nbytes].view(dtype).view(array.shape)
    return views
