"""Rows of a batch -> runs of rows with the same ordered adapter list, for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from loramux.batch import Row
from loramux_kernels.lora import Runs


def build_runs(rows: list[Row], slot: Callable[[str], int]) -> Runs:
    """The runs of a batch's rows, which have equal adapter lists side by side.

    ``slot(digest)`` is the kernels' number of a leased adapter. A base row is in a run without
    entries: the empty adapter list is a list like any other.
    """
    counts: list[int] = []
    entries: list[list[tuple[int, float]]] = []
    for adapters, run in groupby(rows, key=lambda row: row.kv.adapters):
        counts.append(sum(row.num_tokens for row in run))
        entries.append([(slot(ref.digest), ref.scale) for ref in adapters])
    return Runs.build(counts, entries)
