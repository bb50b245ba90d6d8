"""The header parser takes what trainers write and nothing else."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.adapters.peft_files import file_bytes, safetensors_bytes

from loramux.adapters.safetensors_file import (
    BLOCK_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    FileTensor,
    read_tensors,
)
from loramux.errors import AdapterInvalid


def entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(folder: Path, data: bytes) -> AdapterInvalid:
    path = folder / "w"
    path.write_bytes(data)
    with open(path, "rb") as file, pytest.raises(AdapterInvalid) as caught:
        read_tensors(file)
    assert caught.value.problems
    return caught.value


ZEROS = bytes(64)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not_safetensors"),
    "seven bytes": (b"\0" * 7, "not_safetensors"),
    "zip": (b"PK\x03\x04" + ZEROS + b"\x01" * 64, "not_safetensors"),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00" + ZEROS, "not_safetensors"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + ZEROS, "not_safetensors"),
    "elf": (b"\x7fELF\x02\x01\x01\x00" + ZEROS, "not_safetensors"),
    "gzip": (b"\x1f\x8b\x08\x08abcd" + ZEROS, "not_safetensors"),
    "2^62": ((1 << 62).to_bytes(8, "little") + ZEROS, "header_too_large"),
    "all ones": (b"\xff" * 72, "header_too_large"),
    "101 MB": ((101 << 20).to_bytes(8, "little") + ZEROS, "header_too_large"),
    "just over the cap": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + ZEROS,
        "header_too_large",
    ),
    "longer than the file": ((65).to_bytes(8, "little") + ZEROS, "header_invalid"),
    "no header": (file_bytes(b""), "header_invalid"),
    "not JSON": (file_bytes(b"hello there"), "header_invalid"),
    "bad UTF-8": (file_bytes(b'{"\xff": 1}'), "header_invalid"),
    "an array": (file_bytes([1]), "header_invalid"),
    "a bomb": (file_bytes(b"[" * 500_000), "header_invalid"),
    "no tensors": (file_bytes({}), "header_invalid"),
    "only metadata": (file_bytes({"__metadata__": {"a": "b"}}), "header_invalid"),
    "metadata not a map": (
        file_bytes({"__metadata__": [], "a": entry(0, 64)}, ZEROS),
        "header_invalid",
    ),
    "metadata not strings": (
        file_bytes({"__metadata__": {"a": 1}, "a": entry(0, 64)}, ZEROS),
        "header_invalid",
    ),
    "a name twice": (
        file_bytes(
            b'{"a":'
            + json.dumps(entry(0, 64)).encode()
            + b',"a":'
            + json.dumps(entry(0, 64)).encode()
            + b"}",
            ZEROS,
        ),
        "header_invalid",
    ),
    "entry not a map": (file_bytes({"a": 3}, ZEROS), "header_invalid"),
    "entry with more": (file_bytes({"a": {**entry(0, 64), "x": 1}}, ZEROS), "header_invalid"),
    "entry with less": (
        file_bytes({"a": {"dtype": "F32", "shape": [16]}}, ZEROS),
        "header_invalid",
    ),
    "hole first": (file_bytes({"a": entry(4, 64)}, ZEROS), "header_invalid"),
    "hole between": (file_bytes({"a": entry(0, 32), "b": entry(36, 64)}, ZEROS), "header_invalid"),
    "overlap": (file_bytes({"a": entry(0, 36), "b": entry(32, 64)}, ZEROS), "header_invalid"),
    "the same place": (file_bytes({"a": entry(0, 64), "b": entry(0, 64)}, ZEROS), "header_invalid"),
    "trailing bytes": (file_bytes({"a": entry(0, 60)}, ZEROS), "header_invalid"),
    "past the end": (file_bytes({"a": entry(0, 68)}, ZEROS), "header_invalid"),
    "far past the end": (
        file_bytes({"a": entry(0, 1 << 40, [1 << 38])}, ZEROS),
        "header_invalid",
    ),
    "backwards": (file_bytes({"a": entry(64, 0, [16])}, ZEROS), "header_invalid"),
    "negative": (file_bytes({"a": entry(-4, 60, [16])}, ZEROS), "header_invalid"),
    "two negative dimensions": (file_bytes({"a": entry(0, 64, [-4, -4])}, ZEROS), "header_invalid"),
    "shape too small": (file_bytes({"a": entry(0, 64, [15])}, ZEROS), "header_invalid"),
    "product overflows": (
        file_bytes({"a": entry(0, 64, [1 << 32, 1 << 32, 16])}, ZEROS),
        "header_invalid",
    ),
    "huge dimension": (file_bytes({"a": entry(0, 64, [10**400])}, ZEROS), "header_invalid"),
    "many dimensions": (file_bytes({"a": entry(0, 64, [1] * 100_000)}, ZEROS), "header_invalid"),
    "zero dimension": (file_bytes({"a": entry(0, 0, [0, 4])}), "header_invalid"),
    "zero dimension beside another": (
        file_bytes({"a": entry(0, 64), "b": entry(64, 64, [0])}, ZEROS),
        "header_invalid",
    ),
    "float dimension": (file_bytes({"a": entry(0, 64, [16.0])}, ZEROS), "header_invalid"),
    "true for a dimension": (file_bytes({"a": entry(0, 4, [True])}, bytes(4)), "header_invalid"),
    "three offsets": (
        file_bytes({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64, 64]}}, ZEROS),
        "header_invalid",
    ),
    "F64": (file_bytes({"a": entry(0, 64, [8], "F64")}, ZEROS), "header_invalid"),
    "I8": (file_bytes({"a": entry(0, 64, [64], "I8")}, ZEROS), "header_invalid"),
    "F8_E4M3": (file_bytes({"a": entry(0, 64, [64], "F8_E4M3")}, ZEROS), "header_invalid"),
    "dtype unknown": (file_bytes({"a": entry(0, 64, [16], "Q7")}, ZEROS), "header_invalid"),
    "dtype a list": (file_bytes({"a": entry(0, 64, [16], ["F32"])}, ZEROS), "header_invalid"),
    "long name": (file_bytes({"é" * 129: entry(0, 64)}, ZEROS), "header_invalid"),
    "too many": (
        file_bytes(
            b"{" + b",".join(b'"%x":{}' % i for i in range(MAX_TENSORS + 1)) + b"}",
        ),
        "header_invalid",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_refused(tmp_path: Path, case: str) -> None:
    data, code = BAD[case]
    tracemalloc.start()
    try:
        error = refusal(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert error.code == code
    assert all(len(problem) < 1000 for problem in error.problems)


def test_every_bad_entry_is_named(tmp_path: Path) -> None:
    header = {"a": entry(0, 64, [8], "F64"), "b": entry(0, 64, [0]), "c": entry(0, 64), "d": 1}
    problems = refusal(tmp_path, file_bytes(header, ZEROS)).problems
    assert len(problems) == 3
    for name in ("'a'", "'b'", "'d'"):
        assert any(name in problem for problem in problems)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda s: s != "__metadata__"),
        st.lists(st.integers(1, 5), max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([np.float32, np.float16]),
)
def test_what_the_library_writes_reads_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], dtype: type
) -> None:
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    path = tmp_path_factory.mktemp("st") / "w"
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        read = read_tensors(file)
        assert read.keys() == tensors.keys()
        for name, want in tensors.items():
            assert read[name].read().tobytes() == want.tobytes()
            assert read[name].shape == want.shape


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = safetensors_bytes({"a": np.ones((2, 3), "<f4"), "b": np.ones(4, "<f2")})
    forged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        forged[data.draw(st.integers(0, len(forged) - 1))] = data.draw(st.integers(0, 255))
    forged = forged[: data.draw(st.integers(0, len(forged)))]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(forged)
    with open(path, "rb") as file:
        try:
            tensors = read_tensors(file)
        except AdapterInvalid:
            return
        assert sum(t.num_bytes for t in tensors.values()) < len(forged)
        for tensor in tensors.values():
            tensor.read()


def test_at_most_eight_bytes_are_read_of_what_is_no_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    refusal(tmp_path, (1 << 62).to_bytes(8, "little") + ZEROS)
    assert sizes == [8]


def test_blocks_cover_a_tensor_of_odd_size(tmp_path: Path) -> None:
    values = np.arange(BLOCK_BYTES // 4 * 2 + 3, dtype="<f4")
    path = tmp_path / "w"
    path.write_bytes(
        safetensors_bytes({"first": np.ones(1, "<f2"), "a": values[::-1], "b": values})
    )
    with open(path, "rb") as file:
        tensor = read_tensors(file)["b"]
        blocks = list(tensor.blocks())
        assert [b.nbytes for b in blocks] == [BLOCK_BYTES, BLOCK_BYTES, 12]
        assert (np.concatenate(blocks) == values).all()
        assert (tensor.read() == values).all()


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(safetensors_bytes({"a": np.ones(1000, "<f4")}))
    with open(path, "rb") as file:
        tensor: FileTensor = read_tensors(file)["a"]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(AdapterInvalid, match="ends inside"):
            tensor.read()
