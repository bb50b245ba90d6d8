"""The memory of a server's processes over time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EVERY_S = 2.0
ROLES = {"loramux.engine.main": "engine", "loramux.ingest.main": "ingest"}


@dataclass(frozen=True)
class Sample:
    """What one process held at a time: its anonymous memory. Pages of files come and go with the
    page cache, and the pool is allocated at the start."""

    at_s: float
    role: str
    pid: int
    mb: float


def processes(front: int) -> dict[int, str]:
    """The server's processes by pid; children that are none of the known go by their program."""
    found = {front: "front"}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == front:
            roles = [role for module, role in ROLES.items() if module in command]
            found[int(stat.parent.name)] = roles[0] if roles else "other child"
    return found


def anonymous_mb(pid: int) -> float | None:
    """Megabytes of a process that are nobody's file; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return kilobytes[0] / 1024 if kilobytes else None


async def watch(front: int, samples: list[Sample], now: Callable[[], float]) -> None:
    """Add a sample of each process every ``EVERY_S``, until cancelled."""
    while True:
        for pid, role in processes(front).items():
            mb = anonymous_mb(pid)
            if mb is not None:
                samples.append(Sample(now(), role, pid, mb))
        await asyncio.sleep(EVERY_S)


def growth_mb_per_minute(samples: Sequence[Sample], settle_s: float) -> dict[str, float]:
    """The slope of each role's memory: one line through all its processes, each of which begins
    where it began, without the first ``settle_s`` of each. A role without samples left is not
    there."""
    lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.role, sample.pid].append(sample)
    above: dict[str, float] = defaultdict(float)
    below: dict[str, float] = defaultdict(float)
    for (role, _), life in lives.items():
        kept = [s for s in life if s.at_s - life[0].at_s >= settle_s]
        if len(kept) < 3:
            continue
        at = np.array([s.at_s for s in kept]) / 60
        mb = np.array([s.mb for s in kept])
        above[role] += float(((at - at.mean()) * (mb - mb.mean())).sum())
        below[role] += float(((at - at.mean()) ** 2).sum())
    return {role: round(above[role] / below[role], 3) for role in above if below[role]}
