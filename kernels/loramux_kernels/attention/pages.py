"""Where one step's requests keep their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels.attention.paths import Paths
from loramux_kernels.blocks import row_blocks, spread
from loramux_kernels.mirror import mirror

ROW_BLOCK = 8
"""Rows of one request that a work item takes together, so that they read each key once."""

SPLIT = 512
"""Keys that one program of a GPU walks; a longer context is folded from parts of so many."""

_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class Pages:
    """``offsets[l, r, p]`` is the byte offset in the arena of layer l's slice that holds tokens
    ``p * page_tokens`` and following of request r, laid out
    ``[2 (k, v), num_kv_heads, page_tokens, head_dim]`` in ``dtype``. Entries past a request's
    context are never read.

    Request r owns token rows ``row_start[r]:row_start[r+1]`` and holds ``context[r]`` tokens
    after this step, so row t is token ``context[r] - (row_start[r+1] - t)`` of its request.

    Where ``paths`` are given, rows of a tree are other tokens than that, see :class:`Paths`; their
    keys and values lie where those of a chain would.

    Derived, once a step: ``request_of_row`` [rows], and the blocks of at most ROW_BLOCK rows of
    every request, ``block_request`` and ``block_row`` (its first row); a row of a tree is a block
    of its own, since its neighbours see other keys.

    ``layer_start`` [layers], where given, is added to ``offsets``, which then has one layer that
    stands for all: what a GPU takes, so that a step need not write out the table of every layer.
    """

    offsets: npt.NDArray[np.int64]
    row_start: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layer_start: npt.NDArray[np.int64] | None = None
    paths: Paths | None = None
    request_of_row: npt.NDArray[np.int32] = field(init=False)
    block_request: npt.NDArray[np.int32] = field(init=False)
    block_row: npt.NDArray[np.int32] = field(init=False)
    _on_device: list[tuple[dict[str, torch.Tensor], int]] = field(
        default_factory=list, init=False, repr=False
    )

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
        size: int | npt.NDArray[np.int32] = ROW_BLOCK
        if self.paths is not None:
            if self.paths.num_rows != self.num_rows:
                raise ValueError(f"Pages: {self.num_rows} rows, paths of {self.paths.num_rows}")
            size = np.where(self._in_tree(self.row_start[:-1]), 1, ROW_BLOCK).astype(np.int32)
        block_request, block_row = row_blocks(rows, self.row_start[:-1], size)
        object.__setattr__(self, "block_request", block_request)
        object.__setattr__(self, "block_row", block_row)

    def arrays(self) -> tuple[dict[str, npt.NDArray[Any]], int]:
        """What the kernels of a GPU read, and how many parts they keep of split contexts.

        The pages of request r begin at ``page_start[r]`` of ``pages`` [layers or 1, pages in use].
        ``attention_items`` [n, 4] are (request, first row, split, part) for every block of rows and
        every SPLIT keys of its context; the part is -1 for the only one. ``fold_rows`` [m, 4] are
        (row, first row of its block, part of split 0, 0) for rows in parts. ``attention_counts``
        counts the rows, the items and the rows to fold.
        """
        pages = -(-self.context // self.page_tokens)
        inside = np.arange(self.offsets.shape[2]) < pages[:, None]
        end = self.row_start[1:][self.block_request]
        last = np.minimum(self.block_row + (1 if self.alone else ROW_BLOCK), end)
        held = self.context[self.block_request] - (end - last)
        if self.paths is not None:
            tree = self._in_tree(self.block_row)
            last = np.where(tree, self.block_row + 1, last)
            before = self.context - np.diff(self.row_start)
            reached = before[self.block_request] + self.paths.lengths[self.block_row]
            held = np.where(tree, reached, held)
        splits = -(-held // SPLIT)
        parts = np.where(splits > 1, splits, 0)
        first_part = np.cumsum(parts) - parts
        block, split = spread(splits)
        part = np.where(parts > 0, first_part, -1)[block] + np.where(parts[block] > 0, split, 0)
        item = (self.block_request[block], self.block_row[block], split, part)
        cut, nth = spread(np.where(parts > 0, last - self.block_row, 0))
        fold = (self.block_row[cut] + nth, self.block_row[cut], first_part[cut], np.zeros_like(nth))
        layers = len(self.offsets)
        start = self.layer_start
        arrays: dict[str, npt.NDArray[Any]] = {
            "attention_counts": np.array([self.num_rows, len(block), len(cut)], np.int32),
            "layer_start": np.zeros(layers, np.int64) if start is None else start,
            "page_start": np.cumsum(pages, dtype=np.int64) - pages,
            "row_start": self.row_start,
            "context": self.context,
            "request_of_row": self.request_of_row,
            "path_start": self.path_start,
            "path_nodes": self.path_nodes,
            "fold_rows": np.stack(fold, axis=1).astype(np.int32),
            "attention_items": np.stack(item, axis=1).astype(np.int32),
            "pages": np.ascontiguousarray(self.offsets[:, inside]),
        }
        return arrays, int(parts.sum())

    def bind(self, tensors: dict[str, torch.Tensor], num_parts: int) -> None:
        """``tensors`` are this step's ``arrays`` as a device sees them."""
        self._on_device[:] = [(tensors, num_parts)]

    def on_device(self, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
        """What ``bind`` was given; without it the arrays are brought to ``device`` now."""
        if not self._on_device:
            arrays, num_parts = self.arrays()
            self.bind(mirror(arrays, device), num_parts)
        return self._on_device[0]

    def _in_tree(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of these rows are of trees; one past the last is of none."""
        assert self.paths is not None
        return np.append(self.paths.lengths, 0)[rows] > 0

    @property
    def path_start(self) -> npt.NDArray[np.int32]:
        """``paths.start``; empty when no row is of a tree."""
        return _NOTHING if self.paths is None else self.paths.start

    @property
    def path_nodes(self) -> npt.NDArray[np.int32]:
        """``paths.nodes``; empty when no row is of a tree."""
        return _NOTHING if self.paths is None else self.paths.nodes

    @property
    def alone(self) -> bool:
        """True when no block has two rows."""
        return self.num_rows == len(self.block_row)

    @property
    def pages_per_layer(self) -> int:
        """Elements from one layer's pages to the next's in ``arrays()["pages"]``."""
        if self.layer_start is not None:
            return 0
        return int((-(-self.context // self.page_tokens)).sum())

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])


def parts_elements(num_parts: int, rows: int, num_heads: int, head_dim: int) -> int:
    """Scratch that ``num_parts`` parts of ``rows`` rows take: a sum, a maximum and a mass each."""
    return num_parts * rows * num_heads * (head_dim + 2)
