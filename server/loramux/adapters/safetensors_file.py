"""Reading safetensors files that strangers wrote.

    8 bytes    length of the header, little-endian
    header     JSON: {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": ...}
    data       the tensors, one after the other

The public parser accepts much that no trainer writes (duplicate names, empty tensors, headers of
100 MB), and trusting a declared size is how other servers leaked memory; here every byte of the
data belongs to exactly one tensor and every size is checked against the file before it is used.
Reads are positioned reads of bounded blocks, never a map: a file cut short under us is an error,
not a bus error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from loramux.adapters.canonical import ITEMSIZE, STORAGE, Array, Dtype
from loramux.adapters.problems import Problems
from loramux.adapters.strict_json import NotStrictJson, parse_object, shown
from loramux.errors import AdapterInvalid

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 20_000
MAX_NAME_BYTES = 256
MAX_DIMS = 8
BLOCK_BYTES = 1 << 20

DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEMSIZES = {name: ITEMSIZE[dtype] for name, dtype in DTYPES.items()}

Pread = Callable[[int, int], bytes]
"""(size, offset) -> up to that many bytes from there, none only at the end."""

_MAGICS = {
    b"PK\x03\x04": "a zip archive (a PyTorch .bin file is one)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a program",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a numpy file",
}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of an open file (canonical.Matrix when it has two dimensions).

    ``start`` is its byte offset in what ``pread`` reads. Reading raises AdapterInvalid when the
    file has become shorter than it was.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    pread: Pread

    def read(self) -> Array:
        """The whole tensor, ``shape``, in ``STORAGE[dtype]``."""
        flat = np.empty(self.num_bytes // ITEMSIZE[self.dtype], STORAGE[self.dtype])
        filled = 0
        for block in self.blocks():
            flat[filled : filled + block.size] = block
            filled += block.size
        return flat.reshape(self.shape)

    def blocks(self) -> Iterator[Array]:
        """The elements in file order, in flat pieces of at most BLOCK_BYTES."""
        for offset in range(0, self.num_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, self.num_bytes - offset)
            yield np.frombuffer(self._read(self.start + offset, size), STORAGE[self.dtype])

    def _read(self, start: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.pread(size - len(data), start + len(data))
            if not more:
                raise _invalid(f"the file ends inside tensor {shown(self.name)}")
            data += more
        return data


def read_tensors(file: BinaryIO, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, FileTensor]:
    """The tensors of an open safetensors file, in the order of its header. No data is read.

    Raises AdapterInvalid listing every problem found: code not_safetensors, header_too_large,
    or header_invalid.
    """
    header, data_start, data_bytes = _read_header(file, max_header_bytes)

    def pread(size: int, offset: int) -> bytes:
        return os.pread(file.fileno(), size, offset)

    return tensors_of(header, data_start, data_bytes, pread)


def read_bytes(file: BinaryIO, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where the data of a file of byte tensors (U8, one dimension) is: (start, size) by name.

    Raises AdapterInvalid like ``read_tensors``, also when the tensors are not exactly ``names``.
    """
    header, data_start, data_bytes = _read_header(file, MAX_HEADER_BYTES)
    header.pop("__metadata__", None)
    if header.keys() != set(names):
        raise _invalid(f"the file holds {shown(list(header))}, not {', '.join(names)}")
    extents = []
    for name in names:
        try:
            _, shape, start, end = _parse_entry(name, header[name], {"U8": 1})
        except ValueError as error:
            raise _invalid(f"tensor {name}: {error}") from None
        if len(shape) != 1:
            raise _invalid(f"tensor {name}: shape {shown(list(shape))} is not of one dimension")
        extents.append((start, end, name))
    problems = Problems()
    _check_extents(sorted(extents), data_bytes, problems)
    problems.raise_any()
    return {name: (data_start + start, end - start) for start, end, name in extents}


def tensors_of(
    header: dict[str, Any], data_start: int, data_bytes: int, pread: Pread
) -> dict[str, FileTensor]:
    """The tensors that a parsed header describes; see ``read_tensors``. ``pread`` is not called."""
    metadata = header.pop("__metadata__", {})
    problems = Problems()
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.add("__metadata__ is not a map of strings", "header_invalid")
    if not header:
        problems.add("the file holds no tensors", "header_invalid")
    if len(header) > MAX_TENSORS:
        raise _invalid(f"the file holds {len(header)} tensors; at most {MAX_TENSORS} are taken")
    extents: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, start, end = _parse_entry(name, entry, _ITEMSIZES)
        except ValueError as error:
            problems.add(f"tensor {shown(name)}: {error}", "header_invalid")
            continue
        extents.append((start, end, name))
        at = data_start + start
        tensors[name] = FileTensor(name, DTYPES[dtype], shape, at, end - start, pread)
    # With an entry unreadable, what is around it would look like a hole.
    if len(extents) == len(header):
        _check_extents(sorted(extents), data_bytes, problems)
    problems.raise_any()
    return tensors


def _read_header(file: BinaryIO, max_header_bytes: int) -> tuple[dict[str, Any], int, int]:
    """The header, where the data starts, and how many bytes of it there are."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = os.pread(file.fileno(), 8, 0)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > min(max_header_bytes, file_bytes - 8):
        for magic, what in _MAGICS.items():
            if prefix.startswith(magic):
                raise _invalid(f"the weights are {what}, not safetensors", "not_safetensors")
        if len(prefix) < 8:
            raise _invalid("the weights are too short for safetensors", "not_safetensors")
        if header_bytes > max_header_bytes:
            raise _invalid(
                f"the header would be {header_bytes} bytes; at most {max_header_bytes} are taken",
                "header_too_large",
            )
        raise _invalid(f"the header would be {header_bytes} bytes, the file has {file_bytes}")
    text = os.pread(file.fileno(), header_bytes, 8)
    try:
        return parse_object(text), 8 + header_bytes, file_bytes - 8 - header_bytes
    except NotStrictJson as error:
        raise _invalid(f"the header is not valid: {error}") from None


def _parse_entry(
    name: str, entry: object, itemsizes: Mapping[str, int]
) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, start and end of one header entry; ValueError says what is wrong."""
    if len(name.encode("utf-8", "backslashreplace")) > MAX_NAME_BYTES:
        raise ValueError(f"the name is longer than {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("an entry has exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in itemsizes:
        raise ValueError(f"dtype {shown(dtype)} is not one of {', '.join(itemsizes)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_naturals(shape) or 0 in shape or len(shape) > MAX_DIMS:
        raise ValueError(f"shape {shown(shape)} is not up to {MAX_DIMS} positive integers")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {shown(offsets)} are not two integers")
    start, end = offsets
    num_bytes = itemsizes[dtype]
    for dim in shape:
        num_bytes *= dim
    if end - start != num_bytes:
        raise ValueError(
            f"shape {shown(shape)} of {dtype} does not take the {end - start} bytes "
            "of its data_offsets"
        )
    return dtype, tuple(shape), start, end


def _is_naturals(value: object) -> bool:
    # type() and not isinstance(): true and false are ints to Python.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_extents(
    extents: list[tuple[int, int, str]], data_bytes: int, problems: Problems
) -> None:
    """Sorted extents must tile the data exactly."""
    expected = 0
    for start, end, name in extents:
        if start != expected:
            what = "overlaps the one before" if start < expected else "leaves a hole before it"
            problems.add(f"tensor {shown(name)} {what}", "header_invalid")
        expected = max(expected, end)
    if expected != data_bytes:
        problems.add(
            f"the tensors end at byte {expected} of the data, which has {data_bytes}",
            "header_invalid",
        )


def _invalid(text: str, code: str = "header_invalid") -> AdapterInvalid:
    return AdapterInvalid(text, problems=[text], code=code)
