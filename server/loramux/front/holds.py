"""Blobs in use by something the registry does not know of (yet), and the end of all others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from loramux.adapters.blobs import BlobStore


class BlobHolds:
    """Counts the uploads and registrations that need a blob.

    ``hold`` comes before the blob gets its name or is looked for, ``let_go`` after what refers to
    it is in the registry. References are made and ``collect`` is called on one thread, so that a
    blob goes only when it is neither held nor referred to, at one and the same moment.
    """

    def __init__(self, store: BlobStore, is_used: Callable[[str], bool]) -> None:
        self._store = store
        self._is_used = is_used
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def hold(self, digest: str) -> None:
        """Keep the blob."""
        with self._lock:
            self._counts[digest] += 1

    def let_go(self, digest: str) -> bool:
        """As often as it was held; whether that was the last time."""
        with self._lock:
            self._counts[digest] -= 1
            if self._counts[digest]:
                return False
            del self._counts[digest]
            return True

    def collect(self, digest: str) -> None:
        """Delete the blob if nobody needs it."""
        if self._is_used(digest):
            return
        with self._lock:
            if digest not in self._counts:
                self._store.delete(digest)
