"""How much main memory this process may still take: the machine's, and what its cgroups leave.

In a container the machine's free memory says nothing: the kernel ends a process that goes over its
group's limit, and an ancestor's limit counts as well as one's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_V2_LIMITS = ("memory.max", "memory.high")  # above the second the kernel slows a group down
_V1_LIMITS = ("memory.limit_in_bytes",)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes. ``root`` holds ``proc`` and ``sys``."""
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([unused, *_left_by_cgroups(root)]))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """What each group that this process is in, and each above, leaves. None outside Linux."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _up(mount, path, _V2_LIMITS, "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount_v1 = mount / "memory"
            usage = "memory.usage_in_bytes"
            yield from _up(mount_v1, path, _V1_LIMITS, usage, "total_inactive_file")


def _up(
    mount: Path, path: str, limits: tuple[str, ...], usage: str, reclaimable: str
) -> Iterator[int]:
    """From the group at ``path`` to the topmost that can be seen. One that cannot is skipped: in a
    container the path may be the host's, while the mount shows the container's group alone."""
    group = PurePosixPath(path.lstrip("/"))
    for parent in dict.fromkeys((group, *group.parents)):
        folder = mount / parent
        caps = [cap for name in limits if (cap := _number(folder / name)) is not None]
        used = _number(folder / usage)
        if caps and used is not None:
            yield min(caps) - used + _line(folder / "memory.stat", reclaimable)


def _number(path: Path) -> int | None:
    """The file's one number; None when there is none, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _line(path: Path, name: str) -> int:
    """A value of memory.stat: file pages nobody has used of late count as used and can be had."""
    try:
        found = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(found.get(name, 0))
