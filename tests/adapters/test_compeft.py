"""Compressed adapters as strangers write them: read exactly, or refused before they grow."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.adapters.peft_files import (
    base_description,
    file_bytes,
    import_files,
    make_config,
    make_tensors,
    tensor_name,
    write_adapter,
)

from loramux.adapters import compeft
from loramux.adapters.compeft import CODES, HEADER, KEY
from loramux.errors import AdapterInvalid
from loramux_client import compress
from loramux_client._compress import encode

BASE = base_description()
CLAIMS = {"version": 1, "density": 0.1, "alpha": 1.0, "ratio": 9.0, "relative_change": 0.5}


def outer(header: object, codes: bytes, **changes: Any) -> bytes:
    """A compressed weights file; ``changes`` replace entries of its own header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    entries: dict[str, Any] = {
        HEADER: {"dtype": "U8", "shape": [len(text)], "data_offsets": [0, len(text)]},
        CODES: {
            "dtype": "U8",
            "shape": [len(codes)],
            "data_offsets": [len(text), len(text) + len(codes)],
        },
    }
    return file_bytes({**entries, **changes}, text + codes)


def entry(start: int, *shape: int, dtype: str = "F32", itemsize: int = 4) -> dict[str, Any]:
    end = start + int(np.prod(np.array(shape, object))) * itemsize
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


A, B = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")
TENSORS = {A: entry(0, 4, 32), B: entry(512, 32, 4)}
AT = np.array([0, 5, 6, 127, 128, 255])
HEAD = {"scale": 0.5, "kept": 6, "rice_bits": 3, "tensors": TENSORS}
CODE = encode(AT, np.array([0, 1, 0, 0, 1, 1], bool), 3)
CONFIG = make_config(target_modules=["q_proj"], layers_to_transform=[0], loramux_compeft=CLAIMS)


def expand(
    tmp_path: Path, data: bytes, config: dict[str, Any] = CONFIG, base: Any = BASE
) -> dict[str, Any]:
    (tmp_path / "weights").write_bytes(data)
    with open(tmp_path / "weights", "rb") as file:
        found = compeft.expand(config, file, base)
        assert KEY not in found.config
        import_files(found.config, found.tensors, base)
        return {name: tensor.read() for name, tensor in found.tensors.items()}


def test_values_are_where_they_belong(tmp_path: Path) -> None:
    got = expand(tmp_path, outer(HEAD, CODE))
    assert got[A].shape == (4, 32) and got[B].shape == (32, 4)
    flat = np.concatenate([got[A].reshape(-1), got[B].reshape(-1)])
    want = np.zeros(256, np.float32)
    want[AT] = [0.5, -0.5, 0.5, 0.5, -0.5, -0.5]
    assert (flat == want).all()


def test_the_order_is_that_of_the_data_not_of_the_names(tmp_path: Path) -> None:
    swapped = {A: entry(512, 4, 32), B: entry(0, 32, 4)}
    got = expand(tmp_path, outer({**HEAD, "tensors": swapped}, CODE))
    assert np.flatnonzero(got[B]).tolist() == [0, 5, 6, 127]


def test_blocks_are_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(outer(HEAD, CODE))
    monkeypatch.setattr("loramux.adapters.safetensors_file.BLOCK_BYTES", 20)
    with open(tmp_path / "weights", "rb") as file:
        for tensor in compeft.expand(CONFIG, file, BASE).tensors.values():
            blocks = list(tensor.blocks())
            assert max(block.size for block in blocks) == 5
            assert (np.concatenate(blocks) == tensor.read().reshape(-1)).all()


@pytest.mark.parametrize(
    ("dtype", "scale", "bits"),
    [("BF16", 1.5, 0x3FC0), ("F16", 1.5, 0x3E00), ("F16", 65504.0, 0x7BFF), ("F16", 2.0**-24, 1)],
)
def test_halves_hold_the_scale_and_its_negative(
    dtype: str, scale: float, bits: int, tmp_path: Path
) -> None:
    tensors = {A: entry(0, 4, 32, dtype=dtype, itemsize=2)}
    tensors[B] = entry(256, 32, 4, dtype=dtype, itemsize=2)
    got = expand(tmp_path, outer({**HEAD, "scale": scale, "tensors": tensors}, CODE))
    stored = got[A].view("<u2").reshape(-1)
    assert set(stored.tolist()) == {0, bits, bits | 0x8000}


def header(**changes: Any) -> bytes:
    return outer({**HEAD, **changes}, CODE)


def with_tensors(**tensors: Any) -> bytes:
    return header(tensors={**TENSORS, **tensors})


HUGE = {A: entry(0, 1 << 20, 1 << 20)}
HOSTILE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "no codes": (lambda: file_bytes({HEADER: entry(0, 1)}, b"1234"), "header_invalid", "not"),
    "codes of floats": (
        lambda: outer(HEAD, CODE, **{CODES: {**entry(0, 1), "dtype": "F32"}}),
        "header_invalid",
        "dtype 'F32' is not one of U8",
    ),
    "another tensor": (
        lambda: outer(HEAD, CODE, more=entry(0, 1)),
        "header_invalid",
        "not compeft.header, compeft.codes",
    ),
    "codes overlap": (
        lambda: outer(HEAD, CODE, **{CODES: {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}),
        "header_invalid",
        "overlaps",
    ),
    "codes of two dimensions": (
        lambda: outer(
            HEAD,
            CODE,
            **{HEADER: {"dtype": "U8", "shape": [1, 9], "data_offsets": [0, 9]}},
        ),
        "header_invalid",
        "one dimension",
    ),
    "header is no JSON": (lambda: outer(b"nonsense", CODE), "compeft_invalid", "not valid"),
    "header is a list": (lambda: outer(b"[]", CODE), "compeft_invalid", "not an object"),
    "a key twice": (lambda: outer(b'{"kept":1,"kept":1}', CODE), "compeft_invalid", "twice"),
    "a key more": (lambda: header(more=1), "compeft_invalid", "exactly"),
    "large header": (lambda: outer(b" " * (2 << 20), CODE), "header_too_large", "1048576"),
    "tensors are a list": (lambda: header(tensors=[]), "compeft_invalid", "not an object"),
    "no tensors": (lambda: header(tensors={}), "header_invalid", "no tensors"),
    "tensor with a hole": (
        lambda: header(tensors={A: entry(0, 4, 32), B: entry(516, 32, 4)}),
        "header_invalid",
        "hole",
    ),
    "no entry": (lambda: with_tensors(x=5), "header_invalid", "exactly dtype"),
    "shapes that lie": (
        lambda: with_tensors(x={"dtype": "F32", "shape": [4], "data_offsets": [1024, 1025]}),
        "header_invalid",
        "does not take",
    ),
    "several dtypes": (
        lambda: with_tensors(x=entry(1024, 2, dtype="F16", itemsize=2)),
        "compeft_invalid",
        "several dtypes",
    ),
    "kept is zero": (lambda: header(kept=0), "compeft_invalid", "kept"),
    "kept is true": (lambda: header(kept=True), "compeft_invalid", "kept"),
    "kept beyond all": (lambda: header(kept=257), "compeft_invalid", "257 of 256"),
    "rice_bits negative": (lambda: header(rice_bits=-1), "compeft_invalid", "rice_bits"),
    "rice_bits 32": (lambda: header(rice_bits=32), "compeft_invalid", "rice_bits"),
    "rice_bits 1.0": (lambda: header(rice_bits=1.0), "compeft_invalid", "rice_bits"),
    "scale zero": (lambda: header(scale=0.0), "compeft_invalid", "scale"),
    "scale negative": (lambda: header(scale=-0.5), "compeft_invalid", "scale"),
    "scale huge": (lambda: header(scale=1e6), "compeft_invalid", "at most 65504"),
    "scale of hundreds of digits": (lambda: header(scale=10**400), "compeft_invalid", "scale"),
    "scale a text": (lambda: header(scale="1"), "compeft_invalid", "scale"),
    "scale between floats": (lambda: header(scale=0.1), "compeft_invalid", "not a number of f"),
    "wrong count": (lambda: header(kept=5), "compeft_invalid", "more than 5"),
    "truncated codes": (lambda: outer(HEAD, CODE[:-1]), "compeft_invalid", "codes"),
    "codes that overrun": (
        lambda: outer({**HEAD, "rice_bits": 8}, CODE + bytes(9)),
        "compeft_invalid",
        "codes",
    ),
    "2^40 values": (lambda: header(tensors=HUGE), "adapter_too_large", "1099511627776 values"),
    "2^64 values": (
        lambda: header(tensors={A: entry(0, 1 << 32, 1 << 32)}),
        "header_invalid",
        "data_offsets",
    ),
    "more than the base": (
        lambda: header(tensors={A: entry(0, 64, 10_000)}),
        "adapter_too_large",
        "the largest adapter of this base holds",
    ),
    "not of this base": (
        lambda: header(tensors={A: entry(0, 4, 33), B: entry(528, 31, 4)}),
        "adapter_invalid",
        "the base needs",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_with_memory_flat(what: str, tmp_path: Path) -> None:
    make, code, why = HOSTILE[what]
    data = make()
    tracemalloc.start()
    with pytest.raises(AdapterInvalid, match=why) as refused:
        expand(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.code == code
    assert peak < 16 << 20


CLAIMED: list[Any] = [
    None,
    {},
    {**CLAIMS, "version": 2},
    {**CLAIMS, "version": True},
    {**CLAIMS, "more": 1},
    {**CLAIMS, "ratio": "9"},
    {**CLAIMS, "ratio": 10**400},
]


@pytest.mark.parametrize("claims", CLAIMED, ids=lambda c: str(c)[:60])
def test_claims_that_are_none_are_refused(claims: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=KEY):
        expand(tmp_path, outer(HEAD, CODE), {**CONFIG, KEY: claims})


def test_only_lora_is_read_compressed(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="only adapters of peft_type LORA"):
        expand(tmp_path, outer(HEAD, CODE), {**CONFIG, "peft_type": "VERA"})


@pytest.mark.parametrize(("field", "value"), [("max_adapter_bytes", 1000), ("pool_bytes", 4000)])
def test_what_would_crowd_out_others_is_not_expanded(
    field: str, value: int, tmp_path: Path
) -> None:
    """256 values of 4 bytes: more than 1000."""
    with pytest.raises(AdapterInvalid, match="1024 bytes; this server takes up to 1000"):
        expand(tmp_path, outer(HEAD, CODE), base=msgspec.structs.replace(BASE, **{field: value}))
    enough = msgspec.structs.replace(BASE, **{field: value + 100})
    expand(tmp_path, outer(HEAD, CODE), base=enough)


def test_the_largest_adapter_of_a_base_is_taken(tmp_path: Path) -> None:
    base = base_description(max_rank=3)
    tensors = make_tensors(base, rank=3, modules=tuple(base.widths))
    write_adapter(tmp_path / "a", make_config(r=3, target_modules=list(base.widths)), tensors)
    files = compress(tmp_path / "a", 0.1).files
    with files.config.open() as config, files.weights.open() as weights:
        got = expand(tmp_path, weights.read(), json.loads(config.read()), base)
    assert sum(values.size for values in got.values()) == sum(v.size for v in tensors.values())
