"""The upper bounds of every histogram: vLLM's where the name is vLLM's. Seconds and tokens."""

from __future__ import annotations


def one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... up to ``most``: vLLM's buckets for counts of tokens."""
    steps = (digit * 10**power for power in range(8) for digit in (1, 2, 5))
    return [step for step in steps if step <= most]


# fmt: off
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
        40, 80, 160, 640, 2560)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
       80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
           7680)
# fmt: on
TOKENS = one_two_five(1 << 20)
ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N = (1, 2, 5, 10, 20)

STEP = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
VALIDATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
REQUESTS_A_MINUTE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
