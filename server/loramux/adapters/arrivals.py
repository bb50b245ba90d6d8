"""Adapters that rows already run on while their later layers are still on their way.

    link     | block 0 | block 1 | block 2 | ...            one transfer after the other
    forward        | layer 0 | layer 1 | layer 2 | ...      layer l waits for the block it ends in

A row joins a step only when every layer is forecast to be there before the forward pass reaches it;
the wait is there in case the forecast is wrong, and is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

MARGIN = 1.5
"""A transfer is taken to be so much slower than those before it."""
ASSUMED_S_PER_BYTE = 1e-10
"""Until a first transfer is measured: a tenth of a nanosecond a byte (10 GB/s)."""
NEWEST_WEIGHT = 0.2

Clock = Callable[[], float]


class Mark(Protocol):
    """A place in a queue of work of a device (a CUDA event)."""

    def synchronize(self) -> None:
        """Make the calling thread wait until the device has come there."""


class Link:
    """When transfers that follow each other will be done, at the rate of those before."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.s_per_byte = ASSUMED_S_PER_BYTE
        self._clock = clock
        self._free_at = 0.0

    def lands(self, sizes: Sequence[int]) -> npt.NDArray[np.float64]:
        """Transfers of so many bytes were added: the times by which each is done, with margin."""
        begins = max(self._clock(), self._free_at)
        lands = begins + np.cumsum(sizes, dtype=np.float64) * self.s_per_byte * MARGIN
        self._free_at = float(lands[-1])
        return lands

    def took(self, num_bytes: int, seconds: float) -> None:
        """That is what a transfer took from beginning to end."""
        self.s_per_byte += NEWEST_WEIGHT * (seconds / num_bytes - self.s_per_byte)


class Pace:
    """How fast the forward pass goes through the layers: as fast as the last one did."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._scheduled = 0.0
        self._lead_s = 0.0
        self._step_s = 0.0

    def scheduling(self) -> None:
        """A step begins to be put together."""
        self._scheduled = self._clock()

    def starting(self) -> None:
        """Its first layer is given to the device."""
        self._lead_s = self._clock() - self._scheduled

    def took(self, seconds: float) -> None:
        """Its forward pass took so long, from the first layer to the sampled tokens."""
        self._step_s = seconds

    def reaches(self, num_layers: int) -> npt.NDArray[np.float64]:
        """The times at which this step gets to each layer."""
        first = self._scheduled + self._lead_s
        return np.linspace(first, first + self._step_s, num_layers, endpoint=False)


class Arrival:
    """The blocks of one adapter. ``lands`` are the forecast times, ``block_of_layer`` the last
    block each layer needs, never falling; ``hold(mark)`` makes the device wait before it computes
    on, ``done()`` is called when everything is there."""

    def __init__(
        self,
        marks: Sequence[Mark],
        lands: npt.NDArray[np.float64],
        block_of_layer: npt.NDArray[np.int64],
        *,
        hold: Callable[[Mark], None],
        done: Callable[[], None],
    ) -> None:
        self._marks = marks
        self._block_of_layer = block_of_layer
        self._layer_lands = lands[block_of_layer]
        self._hold = hold
        self._done = done

    def keeps_ahead(self, pace: Pace) -> bool:
        """Whether every layer lands before the step that is being put together reaches it."""
        return bool((self._layer_lands <= pace.reaches(len(self._layer_lands))).all())

    def finish(self) -> None:
        """Wait until everything is there; on a loader's thread."""
        self._marks[-1].synchronize()
        self._done()

    def waits(self) -> Callable[[int], None]:
        """For one forward pass: called with each layer, in order, it makes the device wait."""
        held = -1

        def before_layer(layer: int) -> None:
            nonlocal held
            block = int(self._block_of_layer[layer])
            if block > held:
                held = block
                self._hold(self._marks[block])

        return before_layer
