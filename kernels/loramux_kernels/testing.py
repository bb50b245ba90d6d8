"""What every kernel test needs: exact inputs, ragged shapes, comparisons, a count of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from loramux_kernels import dispatch


def integer_tensor(
    *shape: int,
    generator: torch.Generator,
    low: int = -3,
    high: int = 3,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Small whole numbers from ``low`` to ``high``: sums of their products are exact in fp32, so
    every summation order gives the same bits."""
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def ragged_segments(total: int, count: int, *, generator: torch.Generator) -> list[int]:
    """``count`` lengths from 0 up that sum to ``total``; empty segments are likely."""
    cuts = torch.randint(0, total + 1, (count - 1,), generator=generator).sort().values.tolist()
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, up to the sign of zero and with NaN equal to NaN."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float, because: str
) -> None:
    """Equal within a tolerance that ``because`` accounts for."""
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{text}\n(allowed: {because})"
    )


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """The kernel calls made inside, by ``"backend:operation"``; filled when the block ends."""
    before = dispatch.calls.copy()
    inside: Counter[str] = Counter()
    yield inside
    inside.update(dispatch.calls - before)


def place_stream(
    arena: torch.Tensor, stream: torch.Tensor, slices: Sequence[int], slice_bytes: int
) -> None:
    """Lay a 1-D tensor over slices (byte offsets) of the arena, in order."""
    raw = stream.view(torch.uint8)
    for piece, at in zip(torch.split(raw, slice_bytes), slices, strict=False):
        arena[at : at + len(piece)] = piece
