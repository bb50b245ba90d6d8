"""The bytes behind the frame numbers: one buffer, lent to KV cache and adapters alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux.memory.formats import FrameShape


class Arena:
    """``num_frames`` frames of one uint8 tensor ``data`` on ``device``.

    ``poison=True`` overwrites every freed frame with NaN (all bits set), so that a read of memory
    nobody owns any more shows in the next logits; tests run that way.
    """

    def __init__(
        self, num_frames: int, frame: FrameShape, device: torch.device, *, poison: bool = False
    ) -> None:
        self.num_frames = num_frames
        self.frame = frame
        # Cache lines: no slice shares one with a neighbour when slice_bytes is a multiple of 64.
        self.data = torch.empty(num_frames * frame.frame_bytes, dtype=torch.uint8, device=device)
        self._bytes = memoryview(self.data.numpy().data) if device.type == "cpu" else None
        self._poison = poison
        if poison:
            self.data.fill_(0xFF)

    def freed(self, frames: Sequence[int]) -> None:
        """Told by the pool which frames are free now."""
        if self._poison:
            for frame in frames:
                self.frame_data(frame).fill_(0xFF)

    def frame_data(self, frame: int) -> torch.Tensor:
        """The bytes of one frame: uint8 [frame_bytes], a view."""
        size = self.frame.frame_bytes
        return self.data[frame * size : (frame + 1) * size]

    def views(self, frames: Sequence[int], num_bytes: int) -> list[memoryview]:
        """The first ``num_bytes`` of ``frames``, frame by frame, to be written by the host. Only
        on a CPU."""
        assert self._bytes is not None
        size = self.frame.frame_bytes
        starts = [frame * size for frame in frames]
        left = [num_bytes - index * size for index in range(len(frames))]
        return [
            self._bytes[start : start + min(size, rest)]
            for start, rest in zip(starts, left, strict=True)
            if rest > 0
        ]
