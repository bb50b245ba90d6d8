"""How each consumer lays its data on frames and slices.

arena  | frame 0                          | frame 1                          | ...
       | slice 0 | slice 1 | ... slice L-1 | slice 0 | ...
KV     slice l of a frame = layer l's [2 (k, v), num_kv_heads, page_tokens, head_dim]
another model's KV: its layers' parts of a page, one after the other, from a frame's beginning
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
    """KV of a model: a page of ``page_tokens`` tokens per frame.

    The pool is cut for one model, of which each slice of a frame is a layer's part. Another is a
    guest in its frames (``pool_frame``): its layers' parts stand one behind the other from each
    frame's beginning, as many tokens of them as fit.
    """

    model_id: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    itemsize: int
    pool_frame: FrameShape | None = None

    @classmethod
    def guest(
        cls,
        frame: FrameShape,
        *,
        model_id: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
    ) -> KvFormat | None:
        """The format of another model in a pool of such frames; its page is a power of two of
        tokens, which the kernels divide by. None: not one token fits."""
        token_bytes = num_layers * 2 * num_kv_heads * head_dim * itemsize
        page_tokens = 1 << (frame.frame_bytes // token_bytes).bit_length() >> 1
        if page_tokens == 0:
            return None
        shape = (num_layers, num_kv_heads, head_dim, page_tokens, itemsize)
        return cls(model_id, *shape, pool_frame=frame)

    @property
    def layer_bytes(self) -> int:
        """A layer's part of a page."""
        return self.page_tokens * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def frame(self) -> FrameShape:
        """What the pool is cut into."""
        return self.pool_frame or FrameShape(self.num_layers, self.layer_bytes)

    def num_pages(self, num_tokens: int) -> int:
        """Frames that ``num_tokens`` tokens need."""
        return div_ceil(num_tokens, self.page_tokens)

    def offsets(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Byte offsets of each layer's part in ``frames`` [...]: int64 [num_layers, ...]."""
        layers = np.arange(self.num_layers, dtype=np.int64) * self.layer_bytes
        return np.add.outer(layers, frames * self.frame.frame_bytes)


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
