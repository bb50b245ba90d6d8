"""What every kernel test needs: exact inputs, ragged shapes, comparisons, a count of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loramux_kernels import dispatch
from loramux_kernels.lora.table import MODULES, SITES, TABLE_MODULES, VECTORS, AdapterTable


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


@dataclass(frozen=True)
class Weights:
    """One adapter as matrices: A [rank, in] and B [rank, out] by (layer, module index). And the
    middles [rank, rank] of some, and its vectors, by (layer, module index, kind)."""

    matrices: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
    scale: float
    dtype: torch.dtype
    vectors: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    middles: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


def random_weights(
    widths: Mapping[str, tuple[int, int]],
    ranks: Callable[[int, int], int],
    *,
    num_layers: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float = 0.5,
    integers: bool = True,
    middles: bool = False,
) -> Weights:
    """An adapter of rank ``ranks(layer, module)``, of small whole numbers or of normal ones; with
    ``middles`` every pair has one."""
    matrices, between = {}, {}
    for layer in range(num_layers):
        for module, name in enumerate(MODULES):
            rank = ranks(layer, module)
            shapes = [(rank, width) for width in (*widths[name], *([rank] if middles else []))]
            a, b, *r = (
                integer_tensor(*shape, generator=generator)
                if integers
                else torch.randn(shape, generator=generator) / 8
                for shape in shapes
            )
            matrices[layer, module] = a.to(dtype), b.to(dtype)
            if middles and rank:
                between[layer, module] = r[0].to(dtype)
    return Weights(matrices, scale, dtype, middles=between)


def make_resident(
    adapters: Sequence[Weights],
    widths: Mapping[str, tuple[int, int]],
    *,
    num_layers: int,
    slice_bytes: int,
    chunk: int,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, AdapterTable, list[int]]:
    """An arena with the adapters in it, their table and their slots. The slices are shuffled and
    every byte that holds no weight is 0xFF, so that it reads as NaN in any dtype."""
    table = AdapterTable(
        num_layers=num_layers, widths=widths, slice_bytes=slice_bytes, chunk=chunk, device=device
    )
    packed = [_pack(adapter, num_layers, chunk) for adapter in adapters]
    counts = [-(-stream.nbytes // slice_bytes) for stream, *_ in packed]
    total = sum(counts) + 4
    arena = torch.full((total * slice_bytes,), 255, dtype=torch.uint8)
    order = np.random.default_rng(seed).permutation(total).astype(np.int64) * slice_bytes
    slots = []
    for adapter, count, (stream, rank, offsets, vector_offset) in zip(
        adapters, counts, packed, strict=True
    ):
        slices, order = order[:count], order[count:]
        for piece, at in zip(
            torch.split(stream.view(torch.uint8), slice_bytes), slices, strict=True
        ):
            arena[at : at + len(piece)] = piece
        slots.append(
            table.add(
                slices=slices,
                a_offset=offsets[0],
                b_offset=offsets[1],
                rank=rank,
                scale=np.full(rank.shape, adapter.scale, dtype=np.float32),
                dtype=adapter.dtype,
                middle_offset=offsets[2],
                vector_offset=vector_offset,
            )
        )
    return arena.to(device), table, slots


def _pack(
    adapter: Weights, num_layers: int, chunk: int
) -> tuple[torch.Tensor, npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The stream, ranks, offsets of A, of B and of middles, offsets of vectors."""
    offsets = np.zeros((3, num_layers, len(TABLE_MODULES)), dtype=np.int64)
    offsets[2] = -1
    rank = np.zeros((num_layers, len(TABLE_MODULES)), dtype=np.int32)
    vector_offset = np.full((num_layers, len(TABLE_MODULES), len(VECTORS)), -1, np.int64)
    pieces: list[torch.Tensor] = []
    end = 0

    def put(matrix: torch.Tensor) -> int:
        nonlocal end
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % chunk))
        pieces.append(padded.reshape(-1))
        end += padded.numel()
        return end - padded.numel()

    for (layer, module), pair in adapter.matrices.items():
        rank[layer, module] = len(pair[0])
        for side, matrix in enumerate(pair):
            offsets[side, layer, module] = put(matrix)
    for (layer, module), matrix in adapter.middles.items():
        offsets[2, layer, module] = put(matrix)
    for place, vector in adapter.vectors.items():
        vector_offset[place] = put(vector)
    return torch.cat(pieces), rank, offsets, vector_offset


def dense_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    entries: Sequence[tuple[Weights, float]],
    layer: int,
    site: str,
) -> torch.Tensor:
    """What ``add_lora`` must make of rows that share one adapter list, from the matrices alone."""
    if not entries:
        return y
    columns = []
    for module in SITES[site]:
        scales = [c * w.scale for w, c in entries]
        parts = [_dense(x, w, (layer, module)) for w, _ in entries]
        columns.append(torch.stack([s * p for s, p in zip(scales, parts, strict=True)]).sum(0))
    return y + torch.cat(columns, dim=1)


def _dense(x: torch.Tensor, weights: Weights, at: tuple[int, int]) -> torch.Tensor:
    a, b = weights.matrices[at]
    h = x @ a.float().T
    if at in weights.middles:
        h = h @ weights.middles[at].float().T
    return h @ b.float()
