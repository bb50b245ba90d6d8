"""Processes that kill themselves, each at another point of the same work."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYSTEM_CALLS = ("fsync", "replace", "mkdir", "open", "unlink")
Point = Callable[..., None]


class Executioner:
    """Counts points of no return and dies at one."""

    def __init__(self, kill_at: int) -> None:
        self.left = kill_at

    def point(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.point()
            return call(*args, **kwargs)

        return wrapped


def kill_at_points(
    before: Path, folder: Path, work: Callable[[Path, Point], object], every: int = 1
) -> None:
    """For N = 1, 1 + ``every``, ... copies the data directory ``before`` to ``folder``/N and does
    ``work`` there, in a forked process that dies at the N-th point: every call that changes the
    disk is one, and every call of the point that ``work`` is given. Ends after the first that
    lived. Forking keeps this fast, and is safe in a parent with one thread.
    """
    for number in itertools.count(1, every):
        data_dir = folder / str(number)
        shutil.copytree(before, data_dir)
        child = os.fork()
        if child == 0:
            executioner = Executioner(number)
            for name in SYSTEM_CALLS:
                setattr(os, name, executioner.before(getattr(os, name)))
            work(data_dir, executioner.point)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            sys.exit(f"number {number} failed with {status}")


def told(data_dir: Path) -> list[str]:
    """What the one whose work it was had been answered before the death, a line each."""
    path = data_dir.with_suffix(".told")
    return path.read_text().splitlines() if path.exists() else []
