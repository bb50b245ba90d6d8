"""Means of what was seen, by class, that lean on a wider class until they have seen enough."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Cells = tuple[int, ...]

MOST_OWNERS = 1024


class Beliefs:
    """Vectors of means. A mean of n observations is believed n / (n + ``trust``), and the mean of
    the next wider class for the rest; the widest lean on ``prior``. What is older than about
    ``window`` observations is forgotten, also where these did not say anything new.

    The narrowest classes have an owner. Those of the ``most_owners`` that were asked about last are
    kept: whoever comes back later begins again with what is true of everyone.
    """

    def __init__(
        self, prior: Floats, *, window: float, trust: float, most_owners: int = MOST_OWNERS
    ) -> None:
        self._prior, self._window, self._trust = prior, window, trust
        self._most_owners = most_owners
        self._counts = np.zeros((64, len(prior)))
        self._sums = np.zeros((64, len(prior)))
        self._free: list[int] = []
        self._used = 0
        self._wide: dict[Hashable, int] = {}
        self._owned: OrderedDict[Hashable, dict[Hashable, Cells]] = OrderedDict()

    def cells(self, owner: Hashable, *names: Hashable) -> Cells:
        """Where the class ``names[0]`` of ``owner`` is, and the wider ones that are everyone's;
        good until the next call with another owner."""
        owned = self._owned.get(owner)
        if owned is None:
            owned = self._owned[owner] = {}
            if len(self._owned) > self._most_owners:
                _, gone = self._owned.popitem(last=False)
                self._free += [cells[0] for cells in gone.values()]
        self._owned.move_to_end(owner)
        if names[0] not in owned:
            for name in names:
                if name not in self._wide:
                    self._wide[name] = self._cell()
            owned[names[0]] = (self._cell(), *(self._wide[name] for name in names))
        return owned[names[0]]

    def means(self, classes: Sequence[Cells]) -> Floats:
        """What is believed of each of ``classes``: [classes, width of the prior]."""
        mean = self._prior[None]
        for cells in np.array(classes).T[::-1]:
            counts = self._counts[cells]
            mean = (self._sums[cells] + self._trust * mean) / (counts + self._trust)
        return mean

    def counts(self, classes: Sequence[Cells]) -> Floats:
        """How much of what was seen of each of ``classes`` is not forgotten."""
        found: Floats = self._counts[[cells[0] for cells in classes]]
        return found

    def see(self, classes: Sequence[Cells], counts: Floats, sums: Floats) -> None:
        """``counts[i]`` more observations of class i [classes, width], which add up to
        ``sums[i]``."""
        levels = np.array(classes).T
        cells, where = np.unique(levels, return_inverse=True)
        share = np.zeros((len(cells), len(classes)))
        share[where.reshape(levels.shape), np.arange(len(classes))] = 1
        new = share @ counts
        missed = (share @ counts.max(axis=1))[:, None] - new
        all_counts = self._counts[cells] + new
        kept = self._window / np.maximum(all_counts, self._window + missed)
        self._counts[cells] = all_counts * kept
        self._sums[cells] = (self._sums[cells] + share @ sums) * kept

    def _cell(self) -> int:
        if self._free:
            cell = self._free.pop()
            self._counts[cell] = self._sums[cell] = 0
            return cell
        if self._used == len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        self._used += 1
        return self._used - 1
