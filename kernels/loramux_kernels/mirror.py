"""Host tables as a device sees them, and the device's scratch memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
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
    place = StandingMirror(device, {name: (a.dtype.type, a.size) for name, a in arrays.items()})
    place.write(arrays)
    return {
        name: place.tensors[name][: array.size].view(array.shape) for name, array in arrays.items()
    }


class StandingMirror:
    """Named arrays at addresses of a device that stay, so that a CUDA graph can read them.

    ``room`` gives each name's dtype and most elements, in order. An array that outgrows its room
    gets twice what it needs, and everything moves: ``address`` tells. The unused room of the last
    name is not copied, so the array that varies most belongs there.

    ``tensors`` are the arrays on the device: flat, with all of their room.
    """

    tensors: dict[str, torch.Tensor]

    def __init__(
        self, device: torch.device, room: Mapping[str, tuple[type[np.generic], int]]
    ) -> None:
        self._device = device
        self._dtype = {name: np.dtype(dtype) for name, (dtype, _) in room.items()}
        self._room = {name: self._dtype[name].itemsize * n for name, (_, n) in room.items()}
        self._allocate()

    def _allocate(self) -> None:
        # The kernels are compiled for arrays that start at multiples of 16 bytes.
        starts = accumulate((-(-size // 16) * 16 for size in self._room.values()), initial=0)
        *begin, end = starts
        self._start = dict(zip(self._room, begin, strict=True))
        self._there = torch.zeros(end, dtype=torch.uint8, device=self._device)
        self.tensors = {}
        for name, start in self._start.items():
            dtype = torch.from_numpy(np.empty(0, self._dtype[name])).dtype
            self.tensors[name] = self._there[start : start + self._room[name]].view(dtype)

    @property
    def address(self) -> int:
        """Where the arrays are; another number once they had to move."""
        return self._there.data_ptr()

    def write(self, arrays: Arrays) -> None:
        """Replace all the arrays, in one copy. Work already queued reads what was there before.

        The pinned memory is a fresh piece of torch's cache each time, which waits for the copy
        before it gives a piece out again: the host may go on at once.
        """
        tight = {n: 2 * a.nbytes for n, a in arrays.items() if a.nbytes > self._room[n]}
        if tight:
            self._room.update(tight)
            self._allocate()
        end = max(self._start[name] + array.nbytes for name, array in arrays.items())
        host = torch.empty(end, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        target = host.numpy()
        for name, start in self._start.items():
            array = arrays[name]
            if array.dtype != self._dtype[name]:
                raise TypeError(f"{name}: {array.dtype} is not {self._dtype[name]}")
            target[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._there[:end].copy_(host, non_blocking=True)


_scratch: dict[tuple[torch.device, str], torch.Tensor] = {}


def scratch(name: str, device: torch.device, size: int) -> torch.Tensor:
    """fp32 memory that one kernel leaves for the next of the same step: at least ``size``
    elements, at an address that stays until more is asked for."""
    held = _scratch.get((device, name))
    if held is None or held.numel() < size:
        held = torch.empty(max(1024, 2 * size), dtype=torch.float32, device=device)
        _scratch[device, name] = held
    return held


def scratch_addresses(device: torch.device) -> tuple[int, ...]:
    """Where all scratch memory of ``device`` is; a graph that knows another place is stale."""
    return tuple(held.data_ptr() for (where, _), held in _scratch.items() if where == device)
