"""Rows of a batch -> runs of rows with the same ordered adapter list, for the kernels."""

from __future__ import annotations

from collections.abc import Callable

from loramux.batch import Row
from loramux.request import Adapters
from loramux_kernels.lora import Runs


def build_runs(rows: list[Row], slot: Callable[[str], int]) -> Runs:
    """The runs of a batch's rows, which have equal adapter lists side by side.

    ``slot(digest)`` is the kernels' number of a leased adapter. A base row is in a run without
    entries: the empty adapter list is a list like any other.
    """
    row_start, entry_start = [0], [0]
    slots: list[int] = []
    scales: list[float] = []
    previous: Adapters | None = None
    for row in rows:
        adapters = row.request.adapters
        if adapters == previous:
            row_start[-1] += row.num_tokens
            continue
        previous = adapters
        row_start.append(row_start[-1] + row.num_tokens)
        slots += [slot(ref.digest) for ref in adapters]
        scales += [ref.scale for ref in adapters]
        entry_start.append(len(slots))
    return Runs.build(row_start=row_start, entry_start=entry_start, slot=slots, scale=scales)
