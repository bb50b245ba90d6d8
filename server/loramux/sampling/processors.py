"""logit_bias, min_tokens and the penalties, as the few (row, id) entries of a batch they touch.

Nothing here costs anything that grows with rows times vocabulary: the entries are changed in place
and put back afterwards, so rows that use no processor are not even copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Bias:
    """Add ``value`` [n] at (``row``, ``token``) [n]; no entry twice."""

    row: Int64
    token: Int64
    value: Float32

    def apply(self, logits: Tensor) -> None:
        at = _on(logits, self.row, self.token)
        logits[at] += torch.from_numpy(self.value).to(logits.device)


@dataclass(frozen=True)
class Mask:
    """Forbid (``row``, ``token``) [n]. A NaN or +inf stays: masking must not hide a broken row."""

    row: Int64
    token: Int64

    def apply(self, logits: Tensor) -> None:
        at = _on(logits, self.row, self.token)
        logit = logits[at]
        logits[at] = torch.where(logit < torch.inf, -torch.inf, logit)


@dataclass(frozen=True)
class Penalties:
    """vLLM's and OpenAI's penalties at (``row``, ``token``) [n]; no entry twice.

    ``count`` [n] is how often the token stands in the output; ``repetition`` [n] applies to every
    entry, ``frequency`` [n] times the count, ``presence`` [n] where the count is not 0.
    """

    row: Int64
    token: Int64
    count: Float32
    repetition: Float32
    frequency: Float32
    presence: Float32

    def apply(self, logits: Tensor) -> None:
        at = _on(logits, self.row, self.token)
        count, repetition, frequency, presence = (
            torch.from_numpy(field).to(logits.device)
            for field in (self.count, self.repetition, self.frequency, self.presence)
        )
        logit = logits[at]
        logit = torch.where(logit > 0, logit / repetition, logit * repetition)
        logit -= frequency * count
        logit -= presence * (count > 0)
        logits[at] = logit


Edit = Bias | Mask | Penalties


@contextmanager
def edited(logits: Tensor, edits: Sequence[Edit]) -> Iterator[None]:
    """``logits`` [R, V] with ``edits`` applied in their order; on leaving as they were."""
    if not edits:
        yield
        return
    at = _on(
        logits,
        np.concatenate([edit.row for edit in edits]),
        np.concatenate([edit.token for edit in edits]),
    )
    before = logits[at]
    try:
        for edit in edits:
            edit.apply(logits)
        yield
    finally:
        logits[at] = before


def _on(logits: Tensor, row: Int64, token: Int64) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(token).to(logits.device)
