"""How much main memory this process may still take: the machine's, and what its cgroups leave.

In a container the machine's free memory says nothing: the kernel ends a process that goes over its
group's limit, and an ancestor's limit counts as well as one's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Files:
    """What a version of cgroups calls a group's files, and a line of ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    events: str


_V1 = _Files(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)
_V2 = _Files(
    ("memory.max", "memory.high"),  # above the second the kernel slows a group down
    "memory.current",
    "inactive_file",
    "memory.events",
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes. ``root`` holds ``proc`` and ``sys``."""
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([unused, *_left_by_cgroups(root)]))


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's group the kernel has ended for want of memory."""
    for folder, files in _groups(root):
        if (folder / files.events).exists():
            return _line(folder / files.events, "oom_kill")
    return 0


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """What each group that this process is in, and each above, leaves. None outside Linux."""
    for folder, files in _groups(root):
        caps = [cap for name in files.limits if (cap := _number(folder / name)) is not None]
        used = _number(folder / files.usage)
        if caps and used is not None:
            yield min(caps) - used + _line(folder / "memory.stat", files.reclaimable)


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's groups, its own before those above. Some may not be there: in a
    container a path may be the host's, while the mount shows the container's group alone."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        for parent in dict.fromkeys((group, *group.parents)):
            if number == "0":
                yield mount / parent, _V2
            elif "memory" in controllers.split(","):
                yield mount / "memory" / parent, _V1


def _number(path: Path) -> int | None:
    """The file's one number; None when there is none, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _line(path: Path, name: str) -> int:
    """A value of memory.stat (file pages nobody has used of late count as used and can be had), or
    of a group's events."""
    try:
        found = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(found.get(name, 0))
