"""A device whose queues go on in any order that their marks allow, with a clock of its own."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.scatter import scatter


class FakeMark:
    """A place in a lane; waiting for it makes the device work."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.passed = False

    def synchronize(self) -> None:
        assert self.device.gate.wait(20)
        self.device.work_until(lambda: self.passed)


class FakeLane:
    """Work is only noted down when it is given; the device does it later."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.work: deque[Callable[[], bool]] = deque()

    def step(self) -> bool:
        """Do what is next, unless it waits for another lane; whether it was done."""
        if self.work and self.work[0]():
            self.work.popleft()
            return True
        return False

    def wait(self, mark: FakeMark) -> None:
        self.work.append(lambda: mark.passed)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.device.transfers.append(source.numel() * source.itemsize)
        self._do(lambda: target.copy_(source))

    def scatter(
        self, arena: torch.Tensor, staged: torch.Tensor, offsets: torch.Tensor, slice_bytes: int
    ) -> None:
        self.device.num_scatters += 1
        self._do(lambda: scatter(arena, staged, offsets, slice_bytes=slice_bytes))

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        there = torch.full((len(values),), -1)
        self._do(lambda: there.copy_(torch.from_numpy(values)))
        return there

    def mark(self) -> FakeMark:
        mark = FakeMark(self.device)
        self._do(lambda: setattr(mark, "passed", True))
        return mark

    def _do(self, action: Callable[[], object]) -> None:
        def done() -> bool:
            action()
            return True

        self.work.append(done)


class FakeDevice:
    """Picks the lane that goes on at random; what nobody waits for stays undone. While ``gate`` is
    closed, threads that wait for a mark go on waiting."""

    def __init__(self, seed: int = 0) -> None:
        self.lanes: list[FakeLane] = []
        self.transfers: list[int] = []
        self.num_scatters = 0
        self.holds: list[FakeMark] = []
        self.gate = threading.Event()
        self.gate.set()
        self._random = random.Random(seed)
        self._working = threading.RLock()
        self.computing = self.lane()

    def lane(self) -> FakeLane:
        self.lanes.append(FakeLane(self))
        return self.lanes[-1]

    def given(self) -> FakeMark:
        return self.computing.mark()

    def hold(self, mark: FakeMark) -> None:
        self.holds.append(mark)
        self.computing.wait(mark)

    def waited_s(self) -> float:
        return 0.0

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def work_until(self, done: Callable[[], bool]) -> None:
        with self._working:
            while not done():
                lanes = self._random.sample(self.lanes, len(self.lanes))
                assert any(lane.step() for lane in lanes), "the device is stuck"
