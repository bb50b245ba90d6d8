"""What the import found out about an adapter, for whoever uploads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.basis import Basis, facts
from loramux.adapters.canonical import (
    TOKEN_MODULES,
    VECTOR_KINDS,
    CanonicalAdapter,
    LoraPair,
    Matrix,
    widen,
)
from loramux.adapters.formats.upload import Module
from loramux.adapters.pack import Layout
from loramux.ingest.reading import Read
from loramux.wire import TABLE_MODULES, BaseDescription

BATCHES = (1, 8, 32)
"""Rows for which a report says what the adapter costs."""
FLOAT16_MOST = float(np.finfo(np.float16).max)


def report_of(
    adapter: CanonicalAdapter,
    layout: Layout,
    basis: Basis | None,
    base: BaseDescription,
    read: Read,
) -> dict[str, Any]:
    """Its facts, a line for each of TABLE_MODULES at most. Reads every pair once, a matrix at a
    time."""
    placed = read.upload.placed
    changed = {(pair.layer, pair.module) for pair in adapter.pairs}
    changed |= {(vector.layer, vector.module) for vector in adapter.vectors}
    used = {module for _, module in changed} | {tokens.module for tokens in adapter.tokens}
    report: dict[str, Any] = {
        "rank": layout.max_rank,
        "num_bytes": layout.num_bytes,
        "num_frames": layout.num_frames(base.slice_bytes, base.frame_slices),
        "dtype": layout.dtype,
        "vectors": [kind for kind in VECTOR_KINDS if any(v.kind == kind for v in adapter.vectors)],
        "tensors": len(read.upload.tensors),
        "modules": [module for module in TABLE_MODULES if module in used],
        "layers": sorted({layer for layer, module in changed if module not in TOKEN_MODULES}),
        "token_rows": {tokens.module: len(tokens.ids) for tokens in adapter.tokens},
        "by_module": _by_module(adapter, placed),
        "warnings": list(adapter.warnings),
    }
    num_bytes = layout.num_bytes
    if basis is not None:
        report["basis"] = facts(basis, base)
        num_bytes += report["basis"]["num_bytes"]
    report["cost"] = _cost(adapter, num_bytes, base)
    return {**report, "compression": read.compression} if read.compression else report


def _by_module(
    adapter: CanonicalAdapter, placed: Mapping[str, tuple[Module, str] | None]
) -> dict[str, dict[str, Any]]:
    """By module, over all layers: ``tensors`` of the file applied to it; of its pairs the ``rank``,
    the ``scale`` and the ``norm`` (Frobenius, of scale B A), smallest, median and largest; the
    ``largest`` value of A, B and R by magnitude and whether float16 holds it."""
    tensors = Counter(place[0][1] for place in placed.values() if place)
    lines: dict[str, dict[str, Any]] = {}
    for module in TABLE_MODULES:
        if module not in tensors:
            continue
        pairs = [pair for pair in adapter.pairs if pair.module == module]
        lines[module] = {"tensors": tensors[module]}
        if pairs:
            measured = [_measure(pair) for pair in pairs]
            largest = max(size for _, size in measured)
            lines[module] |= {
                "rank": _spread([pair.rank for pair in pairs]),
                "scale": _spread([pair.scale for pair in pairs]),
                "norm": _spread([norm for norm, _ in measured]),
                "largest": largest,
                "fits_float16": largest <= FLOAT16_MOST,
            }
    return lines


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), median(values), max(values)]


def _measure(pair: LoraPair) -> tuple[float, float]:
    """|s B A|, or |s B R A|, and the largest value. |BA|² is the sum of AA' * B'B, element by
    element."""
    gram_a, largest_a = _gram(pair.a, transposed=False)
    gram_b, largest_b = _gram(pair.b, transposed=True)
    if pair.middle is not None:
        _, largest_r = _gram(pair.middle, transposed=False)
        gram_b, largest_b = _gram(pair.folded().b, transposed=True)[0], max(largest_b, largest_r)
    square = float(np.vdot(gram_a.astype(np.float64), gram_b))
    return abs(pair.scale) * max(square, 0.0) ** 0.5, max(largest_a, largest_b)


def _gram(matrix: Matrix, *, transposed: bool) -> tuple[Float32, float]:
    values = widen(matrix.read(), matrix.dtype)
    largest = float(np.abs(values).max(initial=0))
    return (values.T @ values if transposed else values @ values.T), largest


def _cost(adapter: CanonicalAdapter, num_bytes: int, base: BaseDescription) -> dict[str, Any]:
    """``row_bytes``: read for a row that decodes a token; of changed embeddings it looks up one.
    ``percent_of_base``: what so many rows read, each with an adapter of this size to itself, in
    percent of what the base's matrices take once. Rows that share an adapter read it once."""
    looked_up = [t.rows for t in adapter.tokens if t.module == "embed_tokens"]
    row_bytes = num_bytes - sum(4 * r.shape[0] * r.shape[1] for r in looked_up)
    cost: dict[str, Any] = {"row_bytes": row_bytes}
    if base.step_bytes:
        percent = {str(n): round(100 * n * row_bytes / base.step_bytes, 2) for n in BATCHES}
        cost |= {"base_bytes": base.step_bytes, "percent_of_base": percent}
    return cost
