"""Which tokens a request has seen and how often: all that the penalties need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """The distinct ids of a prompt and an output, with their counts in the output.

    It is a function of the ids alone, so it can be built again from them at any time. An id keeps
    its place once it has one, so a commit costs nothing that grows with the context.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self.num_outputs = 0
        seen = np.unique(np.asarray(prompt_ids, np.int64))
        self._num_ids = len(seen)
        self._place = {token: i for i, token in enumerate(seen.tolist())}
        self._ids = np.resize(seen, max(16, 2 * len(seen)))
        self._counts = np.zeros(len(self._ids), np.float32)
        self.extend(output_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct ids [n]."""
        return self._ids[: self._num_ids]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of ``ids`` stands in the output [n]; 0 for ids of the prompt alone."""
        return self._counts[: self._num_ids]

    def after(self, token_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``ids`` and ``counts`` as if the output had grown by ``token_ids``."""
        ids, counts = self.ids, self.counts.copy()
        fresh: dict[int, int] = {}
        for token in token_ids:
            place = self._place.get(token)
            if place is None:
                fresh[token] = fresh.get(token, 0) + 1
            else:
                counts[place] += 1
        return (
            np.concatenate([ids, np.fromiter(fresh, np.int64, len(fresh))]),
            np.concatenate([counts, np.fromiter(fresh.values(), np.float32, len(fresh))]),
        )

    def extend(self, token_ids: Sequence[int]) -> None:
        """The output has grown by ``token_ids``."""
        for token in token_ids:
            place = self._place.setdefault(token, self._num_ids)
            if place == self._num_ids:
                if place == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[place] = token
                self._num_ids += 1
            self._counts[place] += 1
        self.num_outputs += len(token_ids)
