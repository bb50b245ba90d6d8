"""A device whose queues go on in any order that their marks allow, with a clock of its own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch

from loramux_kernels.scatter import scatter


class FakeMark:
    """A place in a lane; waiting for it makes the device work."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.passed = False

    def synchronize(self) -> None:
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
    """Picks the lane that goes on at random; what nobody waits for stays undone."""

    def __init__(self, seed: int = 0) -> None:
        self.lanes: list[FakeLane] = []
        self.transfers: list[int] = []
        self.num_scatters = 0
        self._random = random.Random(seed)
        self.computing = self.lane()

    def lane(self) -> FakeLane:
        self.lanes.append(FakeLane(self))
        return self.lanes[-1]

    def given(self) -> FakeMark:
        return self.computing.mark()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def work_until(self, done: Callable[[], bool]) -> None:
        while not done():
            lanes = self._random.sample(self.lanes, len(self.lanes))
            assert any(lane.step() for lane in lanes), "the device is stuck"
