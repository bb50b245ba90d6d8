"""The heads that adapters bring, at hand for the requests that wear them.

They are read when they are first asked for, on a thread: whoever asks meanwhile is told that there
are none yet, and no step waits. They are kept as long as there is room, the last used ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from loramux.adapters.blobs import BlobStore
from loramux.errors import AdapterLoadFailed
from loramux.speculation.heads import Heads, load_heads
from loramux_kernels.linear import Matrix

RETRY_S = 60.0
"""Before what could not be read is read again."""

Read = Callable[[str], tuple[Heads, int]]
"""The heads in the file of that digest, and their bytes."""

log = logging.getLogger(__name__)


class OwnHeads:
    """Heads by the digest of their file, of at most ``most_bytes`` together."""

    def __init__(self, read: Read, most_bytes: int) -> None:
        self._read = read
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[Heads, int]] = OrderedDict()
        self._num_bytes = 0
        self._reading: set[str] = set()
        self._failed: dict[str, float] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heads")

    def get(self, digest: str) -> Heads | None:
        """The heads; None: not yet."""
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest][0]
            if digest in self._reading:
                return None
            if time.monotonic() < self._failed.get(digest, float("-inf")) + RETRY_S:
                return None
            self._reading.add(digest)
        self._thread.submit(self._bring, digest)
        return None

    def forget(self, digest: str) -> None:
        """Their adapter is gone; nothing happens when they are not here."""
        with self._lock:
            self._reading.discard(digest)
            self._failed.pop(digest, None)
            self._drop(digest)

    def close(self) -> None:
        """End the thread; what it reads is read to the end."""
        self._thread.shutdown(cancel_futures=True)

    def _bring(self, digest: str) -> None:
        found = None
        try:
            found = self._read(digest)
        except Exception:  # whatever it is, no drafter may fail a request
            log.exception("the Medusa heads %s cannot be read: they guess nothing", digest[:12])
        with self._lock:
            if digest not in self._reading:
                return  # forgotten meanwhile
            self._reading.discard(digest)
            if found is None:
                self._failed[digest] = time.monotonic()
                return
            self._failed.pop(digest, None)
            self._kept[digest] = found
            self._num_bytes += found[1]
            while self._num_bytes > self._most_bytes:
                self._drop(next(iter(self._kept)))

    def _drop(self, digest: str) -> None:
        _, num_bytes = self._kept.pop(digest, (None, 0))
        self._num_bytes -= num_bytes


def reader(data_dir: Path, lm_head: Matrix, like: torch.Tensor) -> Read:
    """Reads heads out of a data directory, for a base with that output matrix, to compute in the
    dtype of ``like`` on its device. It raises AdapterInvalid and NotFound, and AdapterLoadFailed
    for a file whose bytes are not those that were uploaded."""
    blobs = BlobStore(data_dir)

    def read(digest: str) -> tuple[Heads, int]:
        if not blobs.verify(digest):
            raise AdapterLoadFailed("a stored file no longer has its digest: the disk damaged it")
        path = blobs.path(digest)
        if like.is_cuda:  # all of it is there before a step's own stream may read it
            stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                heads = load_heads(path, lm_head, like)
            stream.synchronize()
        else:
            heads = load_heads(path, lm_head, like)
        return heads, path.stat().st_size

    return read
