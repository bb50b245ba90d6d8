"""Many values of which each is 0, +s or -s: two bits apiece in memory, fewer in a file.

    quotients   for each value kept, in order: q zeros and a one     }
    remainders  for each, r in ``rice_bits`` bits                     }  each filled up to a byte
    signs       for each, a bit: 1 for -s                             }  with zeros

``(q << rice_bits) + r`` is how many zeros lie before it, from the value kept before. That is a
Rice code (Golomb's for powers of two), its two halves apart: so it is decoded by whole arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_RICE_BITS = 31
CHUNK_BYTES = 1 << 16
"""Of the quotients, at a time: a chunk's arrays take some 30 MB at worst."""

Bits = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Pread = Callable[[int, int], bytes]


class BadCode(ValueError):
    """The bytes are not the code of so many values; the message says why."""


@dataclass(frozen=True, eq=False)
class Ternary:
    """``count`` values; bit i of ``nonzero`` and ``negative``, highest first, is of value i."""

    count: int
    nonzero: Bits
    negative: Bits

    def steps(self, first: int, count: int) -> Bits:
        """0, 1 or 2 for each of so many values: zero, +s, -s."""
        start, end = first // 8, -(-(first + count) // 8)
        skip = first - 8 * start
        nonzero = np.unpackbits(self.nonzero[start:end])[skip : skip + count]
        return nonzero + np.unpackbits(self.negative[start:end])[skip : skip + count]


def decode(pread: Pread, num_bytes: int, count: int, kept: int, rice_bits: int) -> Ternary:
    """The ``count`` values that ``pread``'s ``num_bytes`` stand for, ``kept`` of them not zero.

    Memory is ``count / 4`` bytes and a constant, whatever the bytes say. Raises BadCode unless they
    are exactly what an encoder writes.
    """
    assert 0 <= rice_bits <= MAX_RICE_BITS
    remainder_bytes, sign_bytes = -(-kept * rice_bits // 8), -(-kept // 8)
    quotient_bytes = num_bytes - remainder_bytes - sign_bytes
    if quotient_bytes < -(-kept // 8):
        raise BadCode(f"{num_bytes} bytes cannot hold {kept} values")
    remainders = _Fields(pread, quotient_bytes, rice_bits, kept)
    signs = _Fields(pread, quotient_bytes + remainder_bytes, 1, kept)
    found = Ternary(count, np.zeros(-(-count // 8), np.uint8), np.zeros(-(-count // 8), np.uint8))
    done, last, run = 0, -1, 0  # values found, the last one's index, zeros read since its one
    for offset in range(0, quotient_bytes, CHUNK_BYTES):
        bits = _bits(pread(min(CHUNK_BYTES, quotient_bytes - offset), offset))
        ones = np.flatnonzero(bits)
        if done + len(ones) > kept:
            raise BadCode(f"it holds more than {kept} values")
        if len(ones):
            quotients = np.diff(ones, prepend=-1) - 1
            quotients[0] += run
            gaps = (quotients << rice_bits) + remainders.read(done, len(ones))
            at = last + np.cumsum(gaps + 1)
            # Before the next chunk, so that no sum can outgrow 64 bits.
            if at[-1] >= count:
                raise BadCode(f"it places a value beyond the last of {count}")
            _set(found.nonzero, at)
            _set(found.negative, at[signs.read(done, len(ones)) == 1])
            done, last, run = done + len(ones), int(at[-1]), -int(ones[-1]) - 1
        run += len(bits)
        if run > max(7, count >> rice_bits):
            raise BadCode(f"it places a value beyond the last of {count}")
    if done < kept:
        raise BadCode(f"it holds {done} values, not {kept}")
    if run > 7 or remainders.is_padded_badly() or signs.is_padded_badly():
        raise BadCode("it goes on behind its last value")
    return found


@dataclass(frozen=True)
class _Fields:
    """``count`` numbers of ``width`` bits each, from byte ``start`` on."""

    pread: Pread
    start: int
    width: int
    count: int

    def read(self, first: int, count: int) -> Int64:
        """So many of them."""
        bit = first * self.width
        start, end = bit // 8, -(-(bit + count * self.width) // 8)
        bits = _bits(self.pread(end - start, self.start + start))
        bits = bits[bit - 8 * start :][: count * self.width].reshape(count, self.width)
        values = np.zeros(count, np.int64)
        for column in bits.T:
            values = (values << 1) | column
        return values

    def is_padded_badly(self) -> bool:
        """Whether the last byte's rest is not zeros."""
        rest = self.count * self.width % 8
        if not rest:
            return False
        (last,) = self.pread(1, self.start + self.count * self.width // 8)
        return bool(last & (0xFF >> rest))


def _bits(data: bytes) -> Bits:
    return np.unpackbits(np.frombuffer(data, np.uint8))


def _set(mask: Bits, at: Int64) -> None:
    """Set the bits at these increasing indices."""
    if not len(at):
        return
    byte = at >> 3
    starts = np.flatnonzero(np.diff(byte, prepend=-1))
    mask[byte[starts]] |= np.bitwise_or.reduceat((128 >> (at & 7)).astype(np.uint8), starts)
