"""Uploads that kill themselves, each at another system call.

    python -m tests.adapters.upload_child BEFORE FOLDER

For N = 1, 2, ... copies the data directory BEFORE to FOLDER/N and uploads an adapter there in a
forked process that dies at the N-th point: every call that changes the disk and every SQL statement
is one. Ends after the first upload that lived. A forked process leaves FOLDER/N.ready behind as
soon as mark_ready has returned. Forking keeps this fast, and is safe here: there is one thread.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramux.adapters.blobs import BlobStore
from loramux.adapters.registry import Registry

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', b"w" * 10_000


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


def upload(data_dir: Path, point: Callable[..., None] = lambda *_: None) -> None:
    """The steps of an upload; ``point`` is called where the process might die."""
    store = BlobStore(data_dir)
    registry = Registry(data_dir)
    registry.database.connection.set_trace_callback(point)
    digests = []
    for data in (CONFIG, WEIGHTS):
        with store.writer(len(data)) as writer:
            for start in range(0, len(data), 4000):
                point()
                writer.write(data[start : start + 4000])
            digests.append(writer.commit())
    row, _ = registry.create("new", config_digest=digests[0], weights_digest=digests[1])
    registry.mark_ready(row.id, fingerprint="base", report={"rank": 1})
    data_dir.with_suffix(".ready").touch()
    point()
    registry.close()


def main() -> None:
    before, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for number in itertools.count(1):
        data_dir = folder / str(number)
        shutil.copytree(before, data_dir)
        child = os.fork()
        if child == 0:
            executioner = Executioner(number)
            for name in ("fsync", "replace", "mkdir", "open", "unlink"):
                setattr(os, name, executioner.before(getattr(os, name)))
            upload(data_dir, executioner.point)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            sys.exit(f"upload {number} failed with {status}")


if __name__ == "__main__":
    main()
