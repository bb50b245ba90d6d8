"""The code of ternary values: there and back, and never more than what it says it is."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters import ternary
from loramux.adapters.ternary import BadCode, Pread, Ternary, decode
from loramux_client._compress import encode, rice_bits


def reader(data: bytes) -> Pread:
    return lambda size, offset: data[offset : offset + size]


def code_of(values: npt.NDArray[np.int8], bits: int) -> bytes:
    at = np.flatnonzero(values)
    return encode(at, values[at] < 0, bits)


def decoded(code: bytes, count: int, kept: int, bits: int) -> npt.NDArray[np.int8]:
    found = decode(reader(code), len(code), count, kept, bits)
    steps = found.steps(0, count)
    return np.array([0, 1, -1], np.int8)[steps]


VALUES = st.lists(st.sampled_from([0, 0, 0, 1, -1]), max_size=200)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(0, 9), st.sampled_from([1, 3, 1 << 16]))
def test_there_and_back(listed: list[int], bits: int, chunk: int) -> None:
    values = np.array(listed, np.int8)
    kept = int(np.count_nonzero(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "CHUNK_BYTES", chunk)
        assert decoded(code_of(values, bits), len(values), kept, bits).tolist() == listed


@pytest.mark.parametrize("bits", [0, 1, 5, 20, 31])
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0),
        np.zeros(17),
        np.ones(1),
        -np.ones(17),
        np.eye(1, 70_001, 70_000),  # only the last: one long gap
        np.eye(1, 70_001, 0),
        np.r_[1, np.zeros(70_000), -1],
    ],
    ids=["nothing", "zeros", "one", "all", "last", "first", "both ends"],
)
def test_the_edges(values: npt.NDArray[np.float64], bits: int) -> None:
    whole = values.astype(np.int8).reshape(-1)
    kept = int(np.count_nonzero(whole))
    assert (decoded(code_of(whole, bits), len(whole), kept, bits) == whole).all()


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_it_is_as_small_as_theory_says(density: float) -> None:
    """Within 5 % of the entropy (positions and signs), up to a half of the values."""
    count = 200_003
    rng = np.random.default_rng(1)
    values = np.where(rng.random(count) < density, rng.choice([-1, 1], count), 0).astype(np.int8)
    kept = int(np.count_nonzero(values))
    bits = rice_bits(count, kept)
    code = code_of(values, bits)
    p = kept / count
    entropy = p + (-p * math.log2(p) - (1 - p) * math.log2(1 - p) if p < 1 else 1)
    assert len(code) * 8 / count < 1.05 * entropy + 0.001
    assert all(len(code) <= 1.02 * len(code_of(values, b)) for b in (bits - 1, bits + 1) if b >= 0)
    assert (decoded(code, count, kept, bits) == values).all()


def test_any_part_of_the_values_can_be_had() -> None:
    rng = np.random.default_rng(2)
    values = rng.choice(np.array([0, 1, -1], np.int8), 77)
    code = code_of(values, 1)
    found = decode(reader(code), len(code), 77, int(np.count_nonzero(values)), 1)
    for first in range(77):
        for count in (0, 1, 7, 8, 77 - first):
            want = np.where(values < 0, 2, values)[first : first + count]
            assert found.steps(first, min(count, 77 - first)).tolist() == want.tolist()


GOOD = np.array([0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 0, 1, 0], np.int8)
CODE = code_of(GOOD, 1)  # 1 byte of quotients, one of remainders, one of signs


def try_code(code: bytes, count: int = 13, kept: int = 3, bits: int = 1) -> Ternary:
    return decode(reader(code), len(code), count, kept, bits)


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "truncated": (lambda: try_code(CODE[:2]), "cannot hold"),
    "nothing": (lambda: try_code(b""), "cannot hold"),
    "a byte more": (lambda: try_code(CODE[:1] + b"\x00" + CODE[1:], 99), "goes on"),
    "more ones": (lambda: try_code(b"\xff" + CODE[1:]), "more than 3"),
    "fewer ones": (lambda: try_code(b"\x80" + CODE[1:]), "1 values, not 3"),
    "beyond the last": (lambda: try_code(CODE, count=11), "beyond the last of 11"),
    "kept is less": (lambda: try_code(CODE, kept=2), "more than 2"),
    "kept is more": (lambda: try_code(CODE, kept=4), "3 values, not 4"),
    "kept is 2^40": (lambda: try_code(CODE, kept=1 << 40), "cannot hold"),
    "a run of zeros": (lambda: try_code(bytes(100_000) + CODE[1:]), "beyond the last"),
    "a wide quotient": (lambda: try_code(b"\x49" + bytes(13), bits=31), "beyond the last"),
    "filled with ones": (lambda: try_code(CODE[:1] + bytes([CODE[1] | 1]) + CODE[2:]), "goes on"),
    "signs filled": (lambda: try_code(CODE[:2] + bytes([CODE[2] | 1])), "goes on"),
}


def test_the_code_the_hostile_ones_are_made_of_is_good() -> None:
    assert len(CODE) == 3
    assert (decoded(CODE, 13, 3, 1) == GOOD).all()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_codes_are_refused(what: str) -> None:
    attempt, why = HOSTILE[what]
    with pytest.raises(BadCode, match=why):
        attempt()


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60),
    st.integers(0, 300),
    st.integers(0, 70),
    st.integers(0, ternary.MAX_RICE_BITS),
)
def test_what_is_read_is_what_would_be_written(
    code: bytes, count: int, kept: int, bits: int
) -> None:
    """Any bytes: either refused, or the one code of what they stand for."""
    try:
        values = decoded(code, count, kept, bits)
    except BadCode:
        return
    assert np.count_nonzero(values) == kept
    assert code_of(values, bits) == code


def test_memory_is_a_quarter_of_a_byte_for_each_value_whatever_the_bytes() -> None:
    count = 4_000_000
    values = np.ones(count, np.int8)
    code = code_of(values, 0)
    tracemalloc.start()
    try_code(code, count, count, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with pytest.raises(BadCode):
        try_code(bytes(8 << 20), count=1 << 20, kept=1 << 20, bits=0)
    endless = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count // 4 + (40 << 20)
    assert endless < 60 << 20
