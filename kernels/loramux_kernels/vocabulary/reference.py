"""The obvious torch form of changes to single tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loramux_kernels import dispatch
from loramux_kernels.lora.reference import matrices, stream_of
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import EMBEDDING, HEAD, TABLE_MODULES, AdapterTable

_EMBED = TABLE_MODULES.index("embed_tokens")


def change_embeddings(
    y: torch.Tensor,
    token_ids: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
) -> None:
    """See :func:`loramux_kernels.vocabulary.change_embeddings`."""
    dispatch.calls["reference:change_embeddings"] += 1
    for rows, slot, c in _entries(runs):
        a, b = matrices(arena, table, slot, 0, _EMBED)
        scale = c * float(table.scale[slot, 0, _EMBED])
        delta = scale * (a[:, token_ids[rows]].T @ b)
        ids, vectors = token_rows(arena, table, slot, EMBEDDING)
        which = token_ids[rows][:, None] == ids[None, :]
        delta += c * (which.float() @ vectors)
        y[rows] = (y[rows].float() + delta).to(y.dtype)


def change_logits(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, table: AdapterTable, runs: Runs
) -> None:
    """See :func:`loramux_kernels.vocabulary.change_logits`."""
    dispatch.calls["reference:change_logits"] += 1
    for rows, slot, c in _entries(runs):
        ids, vectors = token_rows(arena, table, slot, HEAD)
        delta = c * (x[rows].float() @ vectors.T)
        y[rows, ids] = (y[rows, ids].float() + delta).to(y.dtype)


def token_rows(
    arena: torch.Tensor, table: AdapterTable, slot: int, where: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter's ids, int64 [n], and their rows [n, hidden], as fp32 copies."""
    count, hidden = int(table.num_token_rows[slot, where]), int(table.in_width[0])
    padded = -(-hidden // table.chunk) * table.chunk
    ids = stream_of(arena, table, slot, int(table.token_ids_offset[slot, where]), count)
    start = int(table.token_rows_offset[slot, where])
    rows = stream_of(arena, table, slot, start, count * padded).view(count, padded)
    return ids.view(torch.int32).long(), rows[:, :hidden]


def _entries(runs: Runs) -> Iterator[tuple[slice, int, float]]:
    """The rows, the slot and the request's scale of every entry."""
    for run in range(len(runs.row_start) - 1):
        rows = slice(int(runs.row_start[run]), int(runs.row_start[run + 1]))
        for entry in range(int(runs.entry_start[run]), int(runs.entry_start[run + 1])):
            yield rows, int(runs.slot[entry]), float(runs.scale[entry])
