"""Timing two sides in turns, what may be said about their ratio, and what the machine can do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of ``work``."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(
    a: Callable[[], float], b: Callable[[], float], pairs: int, say: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """What ``pairs`` calls of each side return (seconds), in the order A B B A A B ..."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[side].append((a, b)[side]())
        say(f"pair {pair + 1}/{pairs}")
    return seconds


def interleave(
    a: Callable[[], object], b: Callable[[], object], pairs: int, say: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Wall-clock seconds of ``pairs`` runs of each, in the order A B B A A B ..."""
    return in_turns(lambda: timed(a)[0], lambda: timed(b)[0], pairs, say)


def median_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    rng = np.random.default_rng(0)
    values = np.array(ratios)
    medians = np.median(rng.choice(values, (4000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def self_ratio(seconds: list[float]) -> tuple[float, float, float]:
    """A against A: neighbouring runs of the same side."""
    return median_interval([x / y for x, y in zip(seconds, seconds[1:], strict=False)])


def machine() -> dict[str, Any]:
    """This machine's name and what it can do at most: GEMM rate and memory bandwidth."""
    n = 1024
    left, right = torch.randn(n, n), torch.randn(n, n)
    gemm = max(2 * n**3 / timed(lambda: torch.mm(left, right))[0] for _ in range(8)) / 1e9
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    copy = max(2 * source.nbytes / timed(lambda: target.copy_(source))[0] for _ in range(5)) / 1e9
    read = max(source.nbytes / timed(lambda: source.sum())[0] for _ in range(5)) / 1e9
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 2)[1].split("\n")[0].strip("\t: ")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_gflops": round(gemm, 1),
        "copy_gb_s": round(copy, 1),
        "read_gb_s": round(read, 1),
    }


def command(argv: list[str]) -> str:
    """How to make a report again, on whatever machine: where it went is left out, and folders of
    this machine are DIR."""
    words = ["python", str(Path(argv[0]).resolve().relative_to(ROOT)), *argv[1:]]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join("DIR" if word.startswith("/") else word for word in words)


def header(argv: list[str] | None = None) -> dict[str, Any]:
    """What a report says of itself; its cases follow. ``argv``: the command's, if it is not this
    process's own."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "command": command(sys.argv if argv is None else argv),
        "commit": commit,
        "machine": machine(),
        "cases": [],
    }
