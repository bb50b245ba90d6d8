"""Power cuts without a power cut: what a disk is sure to have at any moment.

The rules are POSIX's, at their harshest: a file has the bytes of its last fsync and none before it;
a directory has the names of its own last fsync. Since a disk may have more than it must, a second
reading keeps all names that were given and still only the bytes that were synced, which is how
files come to be empty. SQLite does its own writing, out of Python's sight, and is trusted: its
files are taken as they are.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.killing import SYSTEM_CALLS


class Power:
    """Watches the process's fsyncs below ``root``. Everything there at the beginning is durable."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.bytes: dict[int, bytes] = {}
        self.names: dict[Path, dict[str, int]] = {}
        self.paused = False
        for folder, _, files in os.walk(root):
            self.names[Path(folder)] = entries(Path(folder))
            for name in files:
                path = Path(folder) / name
                self.bytes[path.stat().st_ino] = path.read_bytes()
        self._patch = patch

    def watch(self, point: Callable[[], None]) -> None:
        """Calls ``point`` before each system call and records what each fsync made durable."""
        for name in SYSTEM_CALLS:
            self._patch.setattr(os, name, self._around(getattr(os, name), name, point))

    def _around(
        self, call: Callable[..., Any], name: str, point: Callable[[], None]
    ) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.paused:
                point()
            result = call(*args, **kwargs)
            if name == "fsync" and not self.paused:
                self._synced(args[0])
            return result

        return wrapped

    def _synced(self, handle: int) -> None:
        path, status = Path(f"/proc/self/fd/{handle}"), os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            self.names[Path(os.readlink(path))] = entries(path)
        else:
            self.bytes[status.st_ino] = path.read_bytes()

    def cut(self, target: Path, *, keep_names: bool) -> None:
        """What a start after a power cut at this moment would find, in ``target``."""
        self.paused = True
        self._restore(self.root, target, keep_names)
        for path in self.root.glob("registry.sqlite*"):
            shutil.copyfile(path, target / path.name)
        self.paused = False

    def _restore(self, source: Path, target: Path, keep_names: bool) -> None:
        target.mkdir()
        names = entries(source) if keep_names else self.names.get(source, {})
        for name, inode in names.items():
            if (source / name).is_dir():
                self._restore(source / name, target / name, keep_names)
            else:
                (target / name).write_bytes(self.bytes.get(inode, b""))


def entries(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}
