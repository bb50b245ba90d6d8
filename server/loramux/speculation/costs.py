"""What a step costs by its tokens, measured once, when the server starts.

What a guess costs depends on the machine alone: nothing, as long as a step waits for the weights,
and as much as a token, once it waits for the arithmetic. Where that turns is read off a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

POINTS = (1, 16, 4, 8, 2, 32, 64, 128, 3, 6, 12, 24, 48, 96, 192, 256)
"""Numbers of tokens that are tried, in this order: a large model has no time for all of them."""
REPEATS = 3
LIMIT_S = 1.0
"""What a measurement may take, unless the first two points take more."""

NEWEST, FORGOTTEN = 16, 250
"""Steps that were looked at after which what was seen of others counts for little."""


class CostTable:
    """``seconds[n]`` is the time of a step of n token rows, up to ``most``: straight lines between
    the ``measured`` numbers, and beyond the last one as steep as it was on average or at the end,
    whichever is steeper. More rows never take less: where they seem to, the fewer ones were
    disturbed."""

    def __init__(self, measured: Mapping[int, float], most: int) -> None:
        points = np.array(sorted(measured))
        seconds = np.array([measured[point] for point in points.tolist()])
        seconds = np.minimum.accumulate(seconds[::-1])[::-1]
        rows = np.arange(most + 1)
        self.seconds: Floats = np.interp(rows, points, seconds)
        if len(points) > 1:
            slope = max(_slope(points, seconds, 0), _slope(points, seconds, -2))
            self.seconds += slope * np.maximum(rows - points[-1], 0)


class Load(NamedTuple):
    """A step to which nobody has guessed yet: ``rows`` draw a token each, ``tokens`` are computed
    for that and for prompts, and ``budget`` more may be."""

    rows: int
    tokens: int
    budget: int


class Costs(NamedTuple):
    """Seconds of steps whose requests have one token each, ``plain``, and of any others; a device
    replays a recording of the former.

    Prompts have to be computed anyhow, so what they take of a step is no reason to guess and is
    counted on neither side.
    """

    plain: CostTable
    mixed: CostTable

    @classmethod
    def alike(cls, table: CostTable) -> Costs:
        """Where a token costs the same wherever it is from."""
        return cls(table, table)

    def without_guesses(self, load: Load) -> float:
        """Seconds of ``load`` but for its prompts."""
        table = self.plain if load.tokens == load.rows else self.mixed
        return float(table.seconds[load.rows])

    def with_guesses(self, load: Load) -> Floats:
        """The same with 0, 1, ... up to ``load.budget`` guesses among its tokens."""
        seconds = self.mixed.seconds
        prompts = seconds[load.tokens] - seconds[load.rows]
        upto: Floats = seconds[load.tokens : load.tokens + load.budget + 1] - prompts
        return upto


class Reality:
    """How much longer than a table says steps take in which somebody is asked than others do, by
    how many rows they have: what asking, verifying and committing take beside the forward pass, and
    what contexts are longer than when the table was measured.

    While nobody is asked nothing is seen of it, and what was once disturbed by another program
    would stay: so it is slowly forgotten.
    """

    def __init__(self) -> None:
        self._means: dict[tuple[int, bool], float] = {}
        self._counts: Counter[tuple[int, bool]] = Counter()

    def plain(self, rows: int) -> float:
        """What the table's seconds of a step of about ``rows`` in which nobody is asked have to be
        multiplied by; 0 as long as none was seen."""
        return self._means.get((rows.bit_length(), False), 0.0)

    def took(self, rows: int, *, asked: bool, ratio: float) -> None:
        """A step of ``rows`` took ``ratio`` times what the table says."""
        these = (rows.bit_length(), asked)
        mean = self._means.setdefault(these, ratio)
        self._counts[these] += 1
        self._means[these] += (min(ratio, 2 * mean) - mean) / min(self._counts[these], NEWEST)
        if not asked and (those := (rows.bit_length(), True)) in self._means:
            self._means[those] += (self._means[these] - self._means[those]) / FORGOTTEN

    def factor(self, rows: int) -> float:
        """What the table's seconds of a step with guesses have to be multiplied by."""
        size = rows.bit_length()
        plain, asking = self._means.get((size, False)), self._means.get((size, True))
        return asking / plain if plain and asking else 1.0


def measure(
    run: Callable[[int], None],
    most: int,
    clock: Callable[[], float],
    *,
    largest: int = POINTS[-1],
    limit_s: float = LIMIT_S,
) -> CostTable:
    """Time ``run(n)``, a step of n token rows, for some n up to ``largest``, for a table up to
    ``most``: the best of a few, since only other programs make a step longer than it is."""
    best: dict[int, float] = {}
    ends = clock() + limit_s
    for tokens in POINTS:
        if tokens > min(most, largest):
            continue
        if len(best) > 1 and clock() + REPEATS * CostTable(best, most).seconds[tokens] > ends:
            continue
        times = []
        for _ in range(REPEATS):
            began = clock()
            run(tokens)
            times.append(clock() - began)
        best[tokens] = min(times)
    return CostTable(best, most)


def _slope(points: npt.NDArray[np.int64], seconds: Floats, since: int) -> float:
    return float((seconds[-1] - seconds[since]) / (points[-1] - points[since]))
