"""What a device can do at most, and how long a piece of work takes on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import throughput  # before torch: it sets how long waiting threads spin
import torch

BUDGET_S = 0.1
LEAST, MOST = 3, 200


@dataclass(frozen=True)
class Roofline:
    """Bytes/s of a plain read and operations/s of a large GEMM in ``dtype``, the best of some."""

    device: str
    dtype: torch.dtype
    read_bytes_s: float
    flops_s: float

    def seconds(self, num_bytes: float, operations: float) -> float:
        """What work that moves and multiplies this much takes at least."""
        return max(num_bytes / self.read_bytes_s, operations / self.flops_s)

    def describe(self) -> dict[str, object]:
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "read_gb_s": round(self.read_bytes_s / 1e9, 1),
            "gemm_gflops": round(self.flops_s / 1e9, 1),
        }


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(device: str, dtype: torch.dtype) -> Roofline:
    """The roofline of ``device``, measured now."""
    n = 1024 if device == "cpu" else 8192
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(1 << (26 if device == "cpu" else 28), device=device)

    def best(action: Callable[[], object]) -> float:
        return min(seconds(action, device) for _ in range(5))

    return Roofline(
        device,
        dtype,
        source.nbytes / best(source.sum),
        2 * n**3 / best(lambda: torch.mm(left, right)),
    )


def seconds(action: Callable[[], object], device: str) -> float:
    """Seconds a call of ``action`` takes: the median of as many as fit in a tenth of a second.

    On a GPU the calls are captured in a CUDA graph first, so that launches from Python are not
    what is measured.
    """
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(action, return_mode="median")) / 1e3
    action()
    took: list[float] = []
    while len(took) < LEAST or (sum(took) < BUDGET_S and len(took) < MOST):
        took.append(throughput.timed(action)[0])
    return statistics.median(took)
