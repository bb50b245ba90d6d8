"""Where the resident adapters' weights lie in the pool, as arrays that kernels index by slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SITES: dict[str, tuple[int, ...]] = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}
"""Modules that share an input and an output buffer, so that one kernel call serves them."""

TABLE_MODULES = (
    *MODULES,
    "input_layernorm",
    "post_attention_layernorm",
    "norm",
    "lm_head",
    "embed_tokens",
)
"""All that an adapter may change. The last three are not a layer's: ``embed_tokens`` stands with
the first layer, ``norm`` and ``lm_head`` with the last. A norm's width is its in and its out."""

TABLE_SITES: dict[str, tuple[int, ...]] = SITES | {
    name: (index,) for index, name in enumerate(TABLE_MODULES) if index >= len(MODULES)
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Adapter dtypes; a slot stores the index."""

GAIN, SHIFT, INPUT_GAIN = VECTORS = range(3)
"""Vectors a module may have beside its pair, see :mod:`loramux_kernels.modulate`."""

EMBEDDING, HEAD = VOCABULARIES = range(2)
"""Where an adapter may have rows for single tokens, see :mod:`loramux_kernels.vocabulary`."""

_ROWS: dict[str, type[np.generic]] = {
    "a_offset": np.int64,
    "b_offset": np.int64,
    "middle_offset": np.int64,
    "rank": np.int32,
    "scale": np.float32,
    "vector_offset": np.int64,
    "token_ids_offset": np.int64,
    "token_rows_offset": np.int64,
    "num_token_rows": np.int32,
}


class AdapterTable:
    """The resident adapters. Changed only when residency changes, never by a step.

    An adapter is a stream of elements of its own dtype laid over an ordered list of slices:
    element e is at byte ``slices[e // n] + (e % n) * itemsize``, ``n = slice_bytes // itemsize``.
    ``a_offset`` and ``b_offset`` count elements of the stream. A is ``rank`` vectors of the
    module's in width, B ``rank`` vectors of its out width, each padded with zeros to a multiple
    of ``chunk``. Rank 0 means there is no pair. Between them may stand a middle, R [rank, rank] as
    so many vectors padded alike: ``middle_offset`` says where it begins, -1 where there is none.
    Then A and B may be other adapters' too: the lists of all of them begin with the same slices.
    An fp32 adapter may have vectors, padded alike: ``vector_offset`` says where the GAIN and the
    SHIFT (of the out width) and the INPUT_GAIN (of the in width) begin, -1 where there is none. And
    rows for single tokens: ``num_token_rows`` increasing int32 ids, and as many rows of the hidden
    width, padded alike.

    Arrays, indexed by slot: ``a_offset``, ``b_offset``, ``middle_offset``, ``rank``, ``scale``
    [slots, layers, M], M being the TABLE_MODULES, ``vector_offset`` [slots, layers, M, 3],
    ``token_ids_offset``, ``token_rows_offset`` and ``num_token_rows`` [slots, 2], ``dtype`` (index
    into DTYPES) and ``list_start`` [slots]; the slice list of a slot begins at
    ``slices[list_start[slot]]``. ``tensors`` holds the same arrays on ``device``.

    For the host, which asks every step: ``site_rank`` [slots, layers, sites], the largest rank at
    each of the TABLE_SITES, ``site_middles`` [slots, layers, sites], whether there are middles, and
    ``site_vectors`` [slots, layers, sites, 2], whether there are vectors on the outputs, on the
    inputs.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        widths: Mapping[str, tuple[int, int]],
        slice_bytes: int,
        chunk: int,
        device: torch.device | str,
    ) -> None:
        missing = sorted(set(MODULES) - set(widths))
        if missing:
            raise ValueError(f"AdapterTable: widths lacks {', '.join(missing)}")
        if chunk < 16 or chunk & (chunk - 1) or slice_bytes % (chunk * 4):
            raise ValueError(
                f"AdapterTable: chunk ({chunk}) must be a power of two from 16 whose fp32 form "
                f"divides slice_bytes ({slice_bytes})"
            )
        self.num_layers = num_layers
        self.slice_bytes = slice_bytes
        self.chunk = chunk
        self.device = torch.device(device)
        known = [widths.get(module, (0, 0)) for module in TABLE_MODULES]
        self.in_width = np.array([pair[0] for pair in known], dtype=np.int64)
        self.out_width = np.array([pair[1] for pair in known], dtype=np.int64)
        self.site_widths: dict[str, tuple[int, int]] = {}
        for site, modules in TABLE_SITES.items():
            ins = {int(self.in_width[m]) for m in modules}
            if len(ins) != 1:
                raise ValueError(f"AdapterTable: the modules of {site!r} differ in input width")
            self.site_widths[site] = (ins.pop(), int(sum(self.out_width[m] for m in modules)))
        self.slices: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.list_start: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.dtype: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self.a_offset: npt.NDArray[np.int64] = np.zeros(
            (0, num_layers, len(TABLE_MODULES)), dtype=np.int64
        )
        self.b_offset: npt.NDArray[np.int64] = np.zeros(
            (0, num_layers, len(TABLE_MODULES)), dtype=np.int64
        )
        self.middle_offset: npt.NDArray[np.int64] = np.zeros(
            (0, num_layers, len(TABLE_MODULES)), dtype=np.int64
        )
        self.rank: npt.NDArray[np.int32] = np.zeros(
            (0, num_layers, len(TABLE_MODULES)), dtype=np.int32
        )
        self.scale: npt.NDArray[np.float32] = np.zeros(
            (0, num_layers, len(TABLE_MODULES)), dtype=np.float32
        )
        self.vector_offset: npt.NDArray[np.int64] = np.zeros(
            (0, num_layers, len(TABLE_MODULES), len(VECTORS)), dtype=np.int64
        )
        self.token_ids_offset: npt.NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)
        self.token_rows_offset: npt.NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)
        self.num_token_rows: npt.NDArray[np.int32] = np.zeros((0, 2), dtype=np.int32)
        sites = (0, num_layers, len(TABLE_SITES))
        self.site_rank: npt.NDArray[np.int64] = np.zeros(sites, dtype=np.int64)
        self.site_middles: npt.NDArray[np.bool_] = np.zeros(sites, dtype=np.bool_)
        self.site_vectors: npt.NDArray[np.bool_] = np.zeros((*sites, 2), dtype=np.bool_)
        self.tensors: dict[str, torch.Tensor] = {
            "out_width": torch.from_numpy(self.out_width).to(self.device)
        }
        self._free_slots: list[int] = []
        self._extents: dict[int, tuple[int, int]] = {}

    def add(
        self,
        *,
        slices: npt.NDArray[np.int64],
        a_offset: npt.NDArray[np.int64],
        b_offset: npt.NDArray[np.int64],
        rank: npt.NDArray[np.int32],
        scale: npt.NDArray[np.float32],
        dtype: torch.dtype,
        middle_offset: npt.NDArray[np.int64] | None = None,
        vector_offset: npt.NDArray[np.int64] | None = None,
        token_ids_offset: npt.NDArray[np.int64] | None = None,
        token_rows_offset: npt.NDArray[np.int64] | None = None,
        num_token_rows: npt.NDArray[np.int32] | None = None,
    ) -> int:
        """Make an adapter known and return its slot. ``slices`` are byte offsets into the arena;
        the other arrays are [layers, M], ``vector_offset`` [layers, M, 3]. ValueError when an array
        is off or a matrix or vector would lie outside the stream."""
        if middle_offset is None:
            middle_offset = np.full(rank.shape, -1, np.int64)
        if vector_offset is None:
            vector_offset = np.full((*rank.shape, len(VECTORS)), -1, np.int64)
        row: dict[str, npt.NDArray[Any]] = {
            "a_offset": a_offset,
            "b_offset": b_offset,
            "middle_offset": middle_offset,
            "rank": rank,
            "scale": scale,
            "vector_offset": vector_offset,
            "token_ids_offset": _or_zeros(token_ids_offset, np.int64),
            "token_rows_offset": _or_zeros(token_rows_offset, np.int64),
            "num_token_rows": _or_zeros(num_token_rows, np.int32),
        }
        self._check(slices, row, dtype)
        start = self._place(len(slices))
        self.slices[start : start + len(slices)] = slices
        if not self._free_slots:
            self._grow_slots()
        slot = self._free_slots.pop()
        self._extents[slot] = (start, len(slices))
        self.list_start[slot] = start
        self.dtype[slot] = DTYPES.index(dtype)
        for name, values in row.items():
            getattr(self, name)[slot] = values
        self._sum_up(slot)
        self._mirror("slices", start, len(slices))
        for name in ("list_start", "dtype", *_ROWS):
            self._mirror(name, slot, 1)
        return slot

    def _sum_up(self, slot: int) -> None:
        present = self.vector_offset[slot] >= 0
        outputs = present[..., GAIN] | present[..., SHIFT]
        vectors = np.stack([outputs, present[..., INPUT_GAIN]], axis=-1)
        middles = self.middle_offset[slot] >= 0
        for site, modules in enumerate(TABLE_SITES.values()):
            self.site_rank[slot, :, site] = self.rank[slot][:, list(modules)].max(axis=1)
            self.site_middles[slot, :, site] = middles[:, list(modules)].any(axis=1)
            self.site_vectors[slot, :, site] = vectors[:, list(modules)].any(axis=1)

    def reserve(self, slots: int, slices: int) -> None:
        """Make room at once for so many adapters over so many slices: on a device, growing moves
        the arrays, and launches recorded with their addresses have to be recorded again."""
        while len(self.list_start) < slots:
            self._grow_slots()
        if slices > len(self.slices):
            self.slices = np.concatenate((self.slices, np.zeros(slices - len(self.slices), int)))
        for name in ("slices", "list_start", "dtype", *_ROWS):
            self._mirror(name, 0, 0)

    def remove(self, slot: int) -> None:
        """Forget an adapter. No step that names it may be running or to come."""
        if slot not in self._extents:
            raise KeyError(f"AdapterTable: slot {slot} holds no adapter")
        del self._extents[slot]
        self.rank[slot] = 0
        self.num_token_rows[slot] = 0
        self._free_slots.append(slot)

    def _check(
        self, slices: npt.NDArray[np.int64], row: Mapping[str, npt.NDArray[Any]], dtype: torch.dtype
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"AdapterTable.add: dtype {dtype} is not fp32, fp16 or bf16")
        for name, values in row.items():
            shape = getattr(self, name).shape[1:]
            if values.shape != shape or values.dtype != _ROWS[name]:
                raise ValueError(
                    f"AdapterTable.add: {name} must be {_ROWS[name].__name__} {list(shape)}, "
                    f"got {values.dtype} {list(values.shape)}"
                )
        if slices.ndim != 1 or slices.dtype != np.int64:
            raise ValueError("AdapterTable.add: slices must be a 1-D int64 array")
        if (slices % (self.chunk * dtype.itemsize)).any():
            raise ValueError("AdapterTable.add: slices must start at multiples of a chunk")
        if (row["rank"] < 0).any():
            raise ValueError("AdapterTable.add: rank must not be negative")
        elements = len(slices) * (self.slice_bytes // dtype.itemsize)
        present = row["rank"] > 0
        for name, width, there in (
            ("a_offset", self.in_width, present),
            ("b_offset", self.out_width, present),
            ("middle_offset", row["rank"].astype(np.int64), row["middle_offset"] != -1),
        ):
            padded = -(-width // self.chunk) * self.chunk
            end = row[name] + row["rank"] * padded
            bad = (row[name] < 0) | (row[name] % self.chunk != 0) | (end > elements) | ~present
            if (bad & there).any():
                layer, module = (int(i[0]) for i in np.nonzero(bad & there))
                raise ValueError(
                    f"AdapterTable.add: {name} of layer {layer} {TABLE_MODULES[module]} lies "
                    f"outside the stream of {elements} elements or off a chunk of {self.chunk}"
                )

        self._check_vectors(row["vector_offset"], elements, dtype)
        count, hidden = row["num_token_rows"], self.in_width[0]
        padded = -(-hidden // self.chunk) * self.chunk
        for offset, size in (("token_ids_offset", 1), ("token_rows_offset", padded)):
            at = row[offset]
            bad = (at < 0) | (at % self.chunk != 0) | (at + count * size > elements)
            if (bad & (count > 0)).any() or (count < 0).any():
                raise ValueError(f"AdapterTable.add: {offset} is off, or lies outside the stream")
        if count.any() and dtype != torch.float32:
            raise ValueError("AdapterTable.add: an adapter with rows for tokens must be fp32")

    def _check_vectors(
        self, offset: npt.NDArray[np.int64], elements: int, dtype: torch.dtype
    ) -> None:
        present = offset >= 0
        if present.any() and dtype != torch.float32:
            raise ValueError("AdapterTable.add: an adapter with vectors must be fp32")
        width = np.stack([self.out_width, self.out_width, self.in_width], axis=1)
        padded = -(-width // self.chunk) * self.chunk
        bad = present & ((offset % self.chunk != 0) | (offset + padded > elements))
        if bad.any():
            layer, module = (int(i[0]) for i in np.nonzero(bad)[:2])
            raise ValueError(
                f"AdapterTable.add: a vector of layer {layer} {TABLE_MODULES[module]} lies outside "
                f"the stream of {elements} elements or off a chunk of {self.chunk}"
            )

    def _place(self, length: int) -> int:
        """First gap of ``length`` in ``slices``, which grows when there is none."""
        start = 0
        for begin, taken in sorted(self._extents.values()):
            if begin - start >= length:
                return start
            start = begin + taken
        if start + length > len(self.slices):
            grown = np.zeros(max(2 * len(self.slices), start + length), dtype=np.int64)
            grown[: len(self.slices)] = self.slices
            self.slices = grown
        return start

    def _mirror(self, name: str, start: int, count: int) -> None:
        """Bring ``count`` changed elements to the device; all of them after the array grew."""
        array = torch.from_numpy(getattr(self, name))
        known = self.tensors.get(name)
        if known is None or known.shape != array.shape:
            self.tensors[name] = array.to(self.device)
        elif self.device.type != "cpu":
            part = slice(start, start + count)
            known[part].copy_(array[part], non_blocking=True)

    def _grow_slots(self) -> None:
        before = len(self.list_start)
        after = max(8, 2 * before)
        for name in ("list_start", "dtype", "site_rank", "site_middles", "site_vectors", *_ROWS):
            old = getattr(self, name)
            new = np.zeros((after, *old.shape[1:]), dtype=old.dtype)
            new[:before] = old
            setattr(self, name, new)
        self._free_slots.extend(reversed(range(before, after)))


def _or_zeros(values: npt.NDArray[Any] | None, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.zeros(len(VOCABULARIES), dtype) if values is None else values
