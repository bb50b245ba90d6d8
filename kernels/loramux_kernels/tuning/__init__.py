"""How each Triton kernel is launched: tables measured once per kind of GPU and shipped as JSON.

A table names, for every kernel, classes by width (the first whose ``max_width`` is not below the
row's): warps, pipeline stages, programs per multiprocessor and, where the kernel has one, its block
size. One-row and many-row work are kernels of their own, so rows are a key by the kernel's name.
The number of rows, ranks or neighbours of a step is no key on purpose: another warp count is
another order of summation, and a row's bits would depend on who else is in the batch; and a CUDA
graph replays one launch for adapters of any rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
INTERPRETED_PROGRAMS = 1
"""Multiprocessors of a "device" that has none: few, so that programs do take several items."""


@dataclass(frozen=True)
class Launch:
    """``block``: see the kernel; 0 where it has no such choice. ``registers`` is the most a thread
    may take: without it ptxas may rather spill a little than have one block less at a time."""

    warps: int
    stages: int
    programs_per_sm: int = 1
    block: int = 0
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told, as keywords of a launch."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class Table:
    """The settings of one kind of device.

    ``lone_rows`` and ``lone_ranks``: rows and rank vectors of one work item of the one-row LoRA
    kernels, which one work list has for every layer and site.
    """

    name: str
    lone_rows: int
    lone_ranks: int
    kernels: dict[str, tuple[tuple[int | None, Launch], ...]]

    def launch(self, kernel: str, width: int = 0) -> Launch:
        """The settings of ``kernel`` for rows of ``width`` elements."""
        for most, launch in self.kernels[kernel]:
            if most is None or width <= most:
                return launch
        raise KeyError(f"tuning table {self.name}: {kernel} has no class for width {width}")


def parse(name: str, text: str) -> Table:
    """The table of a JSON document. Raises KeyError or TypeError when it lacks or has too much."""
    document: dict[str, Any] = json.loads(text)
    kernels = {
        kernel: tuple((entry.pop("max_width"), Launch(**entry)) for entry in classes)
        for kernel, classes in document["kernels"].items()
    }
    return Table(name, document["lone_rows"], document["lone_ranks"], kernels)


@cache
def table_named(name: str) -> Table:
    """The shipped table ``name``: ``sm_80``, ``sm_90`` or ``default``."""
    return parse(name, (FOLDER / f"{name}.json").read_text())


@cache
def table_of(device: torch.device) -> Table:
    """The table of ``device``; ``default`` where none was made for it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
        if (FOLDER / f"{name}.json").exists():
            return table_named(name)
    return table_named("default")


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def num_programs(launch: Launch, device: torch.device) -> int:
    """The fixed grid of a kernel that takes its work from a list."""
    return launch.programs_per_sm * num_sms(device)
