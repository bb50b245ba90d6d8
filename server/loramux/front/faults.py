"""What adapters are to be blamed for: requests that wore one alone and whose numbers broke."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from loramux.errors import LoramuxError, NumericalError
from loramux.front.generation import GenerationSpec

log = logging.getLogger(__name__)

FLAGGED_FROM = 3
"""So many requests, and it is no accident."""
MOST_DIGESTS = 1000
"""Remembered; beyond that the one whose first fault is the oldest is forgotten."""


class AdapterFaults:
    """Requests that ended with ``numerical_error``, by adapter and tenant, since the front started.

    Only where one adapter of the target was worn alone, as it was uploaded: of several, of a scale
    that a client chose, or of two models in turns, nobody can say what broke the numbers.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def failed(self, spec: GenerationSpec, error: LoramuxError) -> None:
        """A request ended with ``error``."""
        alone = len(spec.adapters) == 1 and spec.adapters[0].scale == 1.0 and spec.entropy is None
        if not isinstance(error, NumericalError) or not alone:
            return
        digest = spec.adapters[0].digest
        counts = self._counts.setdefault(digest, Counter())
        counts[spec.tenant] += 1
        if counts.total() == FLAGGED_FROM:
            log.warning(
                "adapter sha256:%s is flagged: %d requests with it ended with numerical_error; it"
                " is served as before, until somebody deletes it",
                digest[:12],
                FLAGGED_FROM,
            )
        if len(self._counts) > MOST_DIGESTS:
            del self._counts[next(iter(self._counts))]

    def count(self, digest: str, tenant: str | None = None) -> int:
        """How many, of one tenant or (None) of all."""
        counts = self._counts.get(digest, Counter())
        return counts.total() if tenant is None else counts[tenant]

    def flagged(self) -> Iterator[tuple[str, int]]:
        """The digests that are flagged, and how many requests each has broken."""
        for digest, counts in list(self._counts.items()):
            if counts.total() >= FLAGGED_FROM:
                yield digest, counts.total()
