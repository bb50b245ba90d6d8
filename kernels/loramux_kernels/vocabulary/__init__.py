"""What adapters do to single tokens: LoRA on embeddings, ``y += sum_k c_k s_k B_k A_k[:, id]``; and
rows of their own, ``y += sum_k c_k row_k[id]`` and ``logit[id] += sum_k c_k row_k[id] . x``.
"""

from __future__ import annotations

import torch

from loramux_kernels.dispatch import implementation
from loramux_kernels.lora.runs import Runs
from loramux_kernels.lora.table import EMBEDDING, HEAD, AdapterTable

__all__ = ["change_embeddings", "change_logits"]


def change_embeddings(
    y: torch.Tensor,
    token_ids: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    runs: Runs,
) -> None:
    """Add to every row of ``y`` [T, hidden] what its own adapters change of its token's embedding.
    ``token_ids`` is int64 [T]."""
    _check(y, runs, table)
    if runs.top_rank(table, 0, "embed_tokens") or runs.names_tokens(table, EMBEDDING):
        implementation(__name__, y).change_embeddings(y, token_ids, arena, table, runs)


def change_logits(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, table: AdapterTable, runs: Runs
) -> None:
    """Add to the logits ``y`` [S, vocab] of every row of ``x`` [S, hidden] the products with its
    own adapters' rows for single tokens."""
    _check(x, runs, table)
    if runs.names_tokens(table, HEAD):
        implementation(__name__, y).change_logits(y, x, arena, table, runs)


def _check(x: torch.Tensor, runs: Runs, table: AdapterTable) -> None:
    if x.shape[1:] != (table.in_width[0],) or not x.is_contiguous():
        raise ValueError(f"needs contiguous [T, {table.in_width[0]}], got {list(x.shape)}")
    if runs.num_rows > x.shape[0]:
        raise ValueError(f"runs cover {runs.num_rows} rows of {x.shape[0]}")
