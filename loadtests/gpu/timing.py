"""Seconds on a device, and what its memory and its matrix units give."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Action = Callable[[], object]


def seconds(action: Action, *, repeats: int = 20) -> float:
    """Median device seconds of ``action``, by events around each run."""
    for _ in range(3):
        action()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def replayed(actions: list[Action], *, repeats: int = 20) -> float:
    """Median device seconds of one of ``actions``, run one after another from a CUDA graph: no
    gaps between launches, and enough different weights that no cache holds them."""
    for action in actions:
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    return seconds(graph.replay, repeats=repeats) / len(actions)


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a copy (read plus written) and operations/s of a large bf16 product."""

    bandwidth: float
    matmul: float

    def floor(self, num_bytes: float, operations: float) -> float:
        """Seconds that nothing can be faster than."""
        return max(num_bytes / self.bandwidth, operations / self.matmul)


def ceilings() -> Ceilings:
    """Measured now: random data, since zeros run faster than real numbers do."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a = source[: 8192 * 8192].view(8192, 8192)
    b = source[-8192 * 8192 :].view(8192, 8192)
    out = target[: 8192 * 8192].view(8192, 8192)
    matmul = 2 * 8192**3 / seconds(lambda: torch.mm(a, b, out=out))
    return Ceilings(bandwidth, matmul)
