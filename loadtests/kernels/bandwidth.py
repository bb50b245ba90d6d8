"""What the memory of this machine gives while a benchmark runs beside whatever else it does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_buffer = torch.ones(1 << 26)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(action: Callable[[], object], *, repeats: int = 15) -> tuple[float, float]:
    """Median seconds of ``action`` and median bytes/s of a plain read of 256 MiB, in turns, so
    that a busy moment hits both."""
    action()
    timed = [(seconds(action), _buffer.nbytes / seconds(_buffer.sum)) for _ in range(repeats)]
    return statistics.median(t for t, _ in timed), statistics.median(b for _, b in timed)
