"""How each consumer lays its data on frames and slices.

arena  | frame 0                          | frame 1                          | ...
       | slice 0 | slice 1 | ... slice L-1 | slice 0 | ...
KV     slice l of a frame = layer l's [2 (k, v), num_kv_heads, page_tokens, head_dim]
adapter: one stream of elements over the slices of its frames, in order, any slice any layer
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def div_ceil(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class FrameShape:
    """A frame is ``num_slices`` equal slices of ``slice_bytes``."""

    num_slices: int
    slice_bytes: int

    @property
    def frame_bytes(self) -> int:
        return self.num_slices * self.slice_bytes


@dataclass(frozen=True)
class KvFormat:
    """KV of the model the pool is cut for: a page of tokens per frame, one slice a layer."""

    model_id: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    itemsize: int

    @property
    def frame(self) -> FrameShape:
        slice_elems = self.page_tokens * 2 * self.num_kv_heads * self.head_dim
        return FrameShape(self.num_layers, slice_elems * self.itemsize)

    def num_pages(self, num_tokens: int) -> int:
        """Frames that ``num_tokens`` tokens need."""
        return div_ceil(num_tokens, self.page_tokens)

    def offsets(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Byte offsets of the slices of ``frames`` [...]: int64 [num_layers, ...]."""
        shape = self.frame
        layers = np.arange(self.num_layers, dtype=np.int64) * shape.slice_bytes
        return np.add.outer(layers, frames * shape.frame_bytes)


@dataclass(frozen=True)
class AdapterFormat:
    """An adapter's stream over whole frames: at most one frame less one byte is wasted."""

    frame: FrameShape

    def num_frames(self, num_bytes: int) -> int:
        """Frames that a stream of ``num_bytes`` needs."""
        return max(1, div_ceil(num_bytes, self.frame.frame_bytes))

    def slices(self, frames: list[int]) -> npt.NDArray[np.int64]:
        """Byte offsets of the slices of ``frames``, in stream order: int64 [len * num_slices]."""
        starts = np.asarray(frames, dtype=np.int64) * self.frame.frame_bytes
        within = np.arange(self.frame.num_slices, dtype=np.int64) * self.frame.slice_bytes
        return np.add.outer(starts, within).reshape(-1)
