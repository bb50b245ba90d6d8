"""Where one step's requests keep their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.blocks import row_blocks
from loramux_kernels.mirror import mirror

ROW_BLOCK = 8
"""Rows of one request that a work item takes together, so that they read each key once."""


@dataclass(frozen=True)
class Pages:
    """``offsets[l, r, p]`` is the byte offset in the arena of layer l's slice that holds tokens
    ``p * page_tokens`` and following of request r, laid out
    ``[2 (k, v), num_kv_heads, page_tokens, head_dim]`` in ``dtype``. Entries past a request's
    context are never read.

    Request r owns token rows ``row_start[r]:row_start[r+1]`` and holds ``context[r]`` tokens
    after this step, so row t is token ``context[r] - (row_start[r+1] - t)`` of its request.

    Derived, once a step: ``request_of_row`` [rows], and the blocks of at most ROW_BLOCK rows of
    every request, ``block_request`` and ``block_row`` (its first row).
    """

    offsets: npt.NDArray[np.int64]
    row_start: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    request_of_row: npt.NDArray[np.int32] = field(init=False)
    block_request: npt.NDArray[np.int32] = field(init=False)
    block_row: npt.NDArray[np.int32] = field(init=False)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        requests = len(self.context)
        if self.offsets.ndim != 3 or self.offsets.shape[1] != requests:
            raise ValueError(
                f"Pages: offsets must be [layers, {requests}, pages], "
                f"got {list(self.offsets.shape)}"
            )
        if len(self.row_start) != requests + 1:
            raise ValueError(f"Pages: row_start must have {requests + 1} elements")
        if self.context.max(initial=0) > self.offsets.shape[2] * self.page_tokens:
            raise ValueError(
                f"Pages: a context of {self.context.max()} tokens does not fit "
                f"{self.offsets.shape[2]} pages of {self.page_tokens}"
            )
        if (np.diff(self.row_start) > self.context).any():
            raise ValueError("Pages: a request has more rows than context")
        if not self.offsets.flags.c_contiguous:
            raise ValueError("Pages: offsets must be contiguous")
        rows = np.diff(self.row_start)
        owners = np.repeat(np.arange(requests, dtype=np.int32), rows)
        object.__setattr__(self, "request_of_row", owners)
        block_request, block_row = row_blocks(rows, self.row_start[:-1], ROW_BLOCK)
        object.__setattr__(self, "block_request", block_request)
        object.__setattr__(self, "block_row", block_row)

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays on ``device``, brought there once."""
        if not self._tensors:
            arrays = {
                name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)
            }
            self._tensors.update(mirror(arrays, device))
        return self._tensors

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])
