"""Log-probabilities of the raw logits, as the wire wants them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from loramux.wire import TokenLogprob
from loramux_kernels import sampling as kernels


def logprobs(
    logits: Tensor, token_ids: Sequence[int], num: Sequence[int]
) -> list[TokenLogprob | None]:
    """Log-softmax of every row of ``logits`` float32 [R, V] at ``token_ids`` [R].

    ``num`` [R] is how many of the most likely tokens to list per row. Ranks and lists follow one
    order: the greater logit first, the lower id on ties. A row with a NaN, a +inf or no finite
    logit gives None.
    """
    counts = np.asarray(num, np.int64)
    table = kernels.logprobs(logits, np.asarray(token_ids, np.int64), counts)
    listed = (table.top_ids >= 0).sum(axis=1).tolist()
    rows = zip(
        token_ids,
        table.chosen.tolist(),
        table.rank.tolist(),
        table.top_ids.tolist(),
        table.top.tolist(),
        listed,
        strict=True,
    )
    return [
        TokenLogprob(int(token), chosen, rank, list(zip(ids[:n], top[:n], strict=True)))
        if rank > 0
        else None
        for token, chosen, rank, ids, top, n in rows
    ]
