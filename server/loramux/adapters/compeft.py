"""ComPEFT (arXiv 2311.13171): an adapter whose values are all 0, +s or -s, in a fraction of a file.

The config is the adapter's own and has ``loramux_compeft`` beside its fields: what the uploader's
side knows of the compression (``CLAIMS``). The weights are a safetensors file of two byte tensors:

    compeft.header   JSON: {"scale", "kept", "rice_bits", "tensors"}; ``tensors`` is the header of
                     the safetensors file this one stands for, its tensors all of one dtype
    compeft.codes    its values in the order of that file, see ``ternary``

It is expanded into that other file, which is never written: everything from here on reads a plain
adapter. What it would take is checked against the base before anything is decoded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from loramux.adapters.canonical import ITEMSIZE, STORAGE, Array, Dtype, widen
from loramux.adapters.formats.fields import MAX_SCALE
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import (
    MAX_HEADER_BYTES,
    FileTensor,
    Pread,
    read_bytes,
    tensors_of,
)
from loramux.adapters.strict_json import NotStrictJson, parse_object, shown
from loramux.adapters.ternary import MAX_RICE_BITS, BadCode, Ternary, decode
from loramux.errors import AdapterInvalid
from loramux.wire import BaseDescription

KEY = "loramux_compeft"
CLAIMS = ("density", "alpha", "ratio", "relative_change")
"""Numbers in ``config[KEY]``: what was asked for, how many times smaller the file became, and how
far the mean module's change moved, |B'A' - BA| / |BA| (null when nothing changed anything)."""
HEADER, CODES = "compeft.header", "compeft.codes"


@dataclass(frozen=True, eq=False)
class Expanded:
    """The adapter a compressed one stands for. ``config`` lacks KEY; ``facts`` are for reports."""

    config: dict[str, Any]
    tensors: dict[str, FileTensor]
    facts: dict[str, Any]


def expand(config: Mapping[str, Any], file: BinaryIO, base: BaseDescription) -> Expanded:
    """Decode an open weights file whose config has KEY.

    Memory is a quarter of a byte for each value; a reader of tensors takes them block by block.
    Raises AdapterInvalid (compeft_invalid, adapter_too_large, header_invalid).
    """
    plain = {name: value for name, value in config.items() if name != KEY}
    claims = _claims(config[KEY], plain)
    places = read_bytes(file, (HEADER, CODES))
    header = _header(_reader(file, *places[HEADER]), places[HEADER][1])
    dtype, count, tensors = _tensors(header)
    _check_size(count, count * ITEMSIZE[dtype], base)
    scale = _scale(header["scale"], dtype)
    code_bytes = places[CODES][1]
    try:
        values = decode(
            _reader(file, *places[CODES]), code_bytes, count, header["kept"], header["rice_bits"]
        )
    except BadCode as error:
        raise _invalid(f"{CODES}: {error}") from None
    pread = _Values(values, dtype, scale).pread
    facts = {
        "kept": header["kept"],
        "values": count,
        "file_bytes": sum(size for _, size in places.values()),
        "expanded_bytes": count * ITEMSIZE[dtype],
        "claimed": claims,
    }
    return Expanded(plain, {n: replace(t, pread=pread) for n, t in tensors.items()}, facts)


def _claims(value: object, config: Mapping[str, Any]) -> dict[str, Any]:
    problems = Problems()
    if not isinstance(value, dict) or value.keys() != {"version", *CLAIMS}:
        problems.add(f"{KEY} has exactly version, {', '.join(CLAIMS)}")
    elif type(value["version"]) is not int or value["version"] != 1:
        problems.add(f"{KEY}: version is {shown(value['version'])}; this server reads 1")
    elif not all(_is_number(value[n]) or value[n] is None for n in CLAIMS):
        problems.add(f"{KEY}: {shown(value)}: {', '.join(CLAIMS)} are numbers or null")
    if config.get("peft_type") != "LORA":
        problems.add(f"{KEY}: only adapters of peft_type LORA are read compressed")
    problems.raise_any()
    return {name: value[name] for name in CLAIMS}  # type: ignore[index]


def _is_number(value: object) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer of hundreds of digits
        return False


def _header(pread: Pread, size: int) -> dict[str, Any]:
    if size > MAX_HEADER_BYTES:
        text = f"{HEADER} is {size} bytes; at most {MAX_HEADER_BYTES} are taken"
        raise AdapterInvalid(text, problems=[text], code="header_too_large")
    try:
        header = parse_object(pread(size, 0))
    except NotStrictJson as error:
        raise _invalid(f"{HEADER} is not valid: {error}") from None
    if header.keys() != {"scale", "kept", "rice_bits", "tensors"}:
        raise _invalid(f"{HEADER} has exactly scale, kept, rice_bits and tensors")
    if not isinstance(header["tensors"], dict):
        raise _invalid(f"{HEADER}: tensors is not an object")
    if type(header["kept"]) is not int or header["kept"] < 1:
        raise _invalid(f"{HEADER}: kept is {shown(header['kept'])}, not a positive integer")
    bits = header["rice_bits"]
    if type(bits) is not int or not 0 <= bits <= MAX_RICE_BITS:
        raise _invalid(f"{HEADER}: rice_bits is {shown(bits)}, not 0 to {MAX_RICE_BITS}")
    return header


def _tensors(header: dict[str, Any]) -> tuple[Dtype, int, dict[str, FileTensor]]:
    """Their one dtype, how many values they hold together, and the tensors, not readable yet."""
    ends = [_end(entry) for entry in header["tensors"].values()]
    tensors = tensors_of(header["tensors"], 0, max(ends, default=0), lambda size, offset: b"")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise _invalid(f"{HEADER}: its tensors are of several dtypes: {', '.join(sorted(dtypes))}")
    (dtype,) = dtypes
    count = sum(tensor.num_bytes for tensor in tensors.values()) // ITEMSIZE[dtype]
    if header["kept"] > count:
        raise _invalid(f"{HEADER}: {header['kept']} of {count} values are kept")
    return dtype, count, tensors


def _end(entry: Any) -> int:
    """Where a tensor's data ends, if the entry says so; what is wrong with it is found later."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    ends = [value for value in offsets if type(value) is int] if isinstance(offsets, list) else []
    return max(ends, default=0)


def _check_size(count: int, num_bytes: int, base: BaseDescription) -> None:
    """A few bytes can stand for any number of zeros. So no adapter is expanded that holds more than
    the largest LoRA of this base, nor one that takes more than its share of the pool."""
    ends = [base.table_widths[module] for module in ("lm_head", "embed_tokens")]
    widths = sum(map(sum, base.widths.values())) * base.num_layers + sum(map(sum, ends))
    most = base.max_rank * widths
    if count > most:
        text = f"it expands to {count} values; the largest adapter of this base holds {most}"
        raise AdapterInvalid(text, problems=[text], code="adapter_too_large")
    limit = base.max_adapter_bytes or base.pool_bytes // 4
    if limit and num_bytes > limit:
        text = (
            f"it expands to {num_bytes} bytes; this server takes up to {limit}"
            " (--max-adapter-bytes)"
        )
        raise AdapterInvalid(text, problems=[text], code="adapter_too_large")


def _scale(value: Any, dtype: Dtype) -> Array:
    """The scale as ``STORAGE[dtype]`` holds it, [1]."""
    if not _is_number(value) or not 0 < value <= MAX_SCALE:
        raise _invalid(f"{HEADER}: scale is {shown(value)}, not above 0 and at most {MAX_SCALE:g}")
    if dtype == "bfloat16":
        bits = np.array([value], "<f4").view("<u4") >> 16
        stored = bits.astype(STORAGE[dtype])
    else:
        stored = np.array([value], STORAGE[dtype])
    if float(widen(stored, dtype)[0]) != value:
        raise _invalid(f"{HEADER}: scale {shown(value)} is not a number of {dtype}")
    return stored


class _Values:
    """The data of the file that is stood for."""

    def __init__(self, values: Ternary, dtype: Dtype, scale: Array) -> None:
        self._values, self._itemsize = values, ITEMSIZE[dtype]
        sign = scale.view(f"<u{self._itemsize}") | (1 << (8 * self._itemsize - 1))
        self._table = np.concatenate([np.zeros_like(scale), scale, sign.view(scale.dtype)])

    def pread(self, size: int, offset: int) -> bytes:
        """Whole values only: that is what tensors ask for."""
        first, count = offset // self._itemsize, size // self._itemsize
        return self._table[self._values.steps(first, count)].tobytes()


def _reader(file: BinaryIO, start: int, size: int) -> Pread:
    def pread(count: int, offset: int) -> bytes:
        data = os.pread(file.fileno(), count, start + offset)
        if len(data) < count:
            raise _invalid("the file ends early")
        return data

    return pread


def _invalid(text: str) -> AdapterInvalid:
    return AdapterInvalid(text, problems=[text], code="compeft_invalid")
