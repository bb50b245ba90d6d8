"""Loads that failed: whom to tell why, and which are tried again as if nothing had been."""

from __future__ import annotations

import time

from loramux.errors import AdapterLoadFailed, LoramuxError, Overloaded
from loramux.memory.shortage import is_shortage

MOST_TRIES = 8
"""How often a load is tried that finds no memory beside the pool, until who waits for it fails."""
RETRY_S = 0.05
"""From the first try to the second; twice as long after every further one."""


class LoadErrors:
    """By digest. ``num_shortages`` counts loads that found no memory."""

    def __init__(self) -> None:
        self.num_shortages = 0
        self._errors: dict[str, LoramuxError] = {}
        self._short: dict[str, tuple[int, float]] = {}  # how often, and until when it rests

    def add(self, digest: str, error: Exception) -> None:
        """A load of ``digest`` failed."""
        if is_shortage(error):
            self.num_shortages += 1
            tries = self._short.get(digest, (0, 0.0))[0] + 1
            if tries < MOST_TRIES:
                self._short[digest] = tries, time.monotonic() + RETRY_S * 2 ** (tries - 1)
                return
            error = Overloaded("there is no memory to load the adapter with")
        elif not isinstance(error, LoramuxError):
            error = AdapterLoadFailed(f"the adapter's packed file could not be read: {error}")
        self._short.pop(digest, None)
        self._errors[digest] = error

    def throw(self, digest: str) -> None:
        """Raise why the last load failed for good, once."""
        if (error := self._errors.pop(digest, None)) is not None:
            raise error

    def rests(self, digest: str) -> bool:
        """It is not yet time to try again."""
        return digest in self._short and time.monotonic() < self._short[digest][1]

    def loaded(self, digest: str) -> None:
        """A load went well."""
        self._short.pop(digest, None)
