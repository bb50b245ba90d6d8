"""The packed form of an adapter: one stream of elements, ready to be laid over pool slices.

    8 bytes   magic
    4         format version     }
    4         header length      } little-endian
    32        SHA-256 of the header
    header    msgpack, see _Header
    zeros     up to ``payload_offset``, a multiple of 4096
    payload   ``num_elems`` elements of the adapter's dtype, little-endian

Matrices are rank-major: A is r vectors of ``in`` elements (as in the file), B is r vectors of
``out`` (transposed from the file's [out, r]), R between them r vectors of r. A vector takes its
width rounded up to whole chunks, the rest being zero; vectors follow each other without gaps.
Layers come in order, and within one the order of use: what changes embeddings (with the first
layer), the input norm; input gains, A, R, gains, shifts and B of q, k, v, then those of o; the
second norm; gate and up, down; the final norm and lm_head (with the last). So a layer can run once
the slices up to its end are there. What several modules share (one Matrix object: VeRA's A) is
there once, where it is first used.

A pair with an R has its A and B in the stream of a basis: a packed file of its own, under a digest
of its own, which ``basis`` names. In the pool an adapter's slices follow those of its basis, as one
stream (``Layout.after``).

The packed form is derived: (digest, base, importer version) name it, and it is made again when it
is missing. It depends on the widths of the base but not on the size of a slice: when one chunk
size divides all widths nothing is padded, and else the chunk is the smallest there is.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from loramux.adapters.blobs import (
    READ_BYTES,
    check_digest,
    disk_errors,
    make_durable_dir,
    publish,
)
from loramux.adapters.canonical import (
    ITEMSIZE,
    STORAGE,
    TOKEN_MODULES,
    VECTOR_KINDS,
    Array,
    CanonicalAdapter,
    Dtype,
    Matrix,
    VectorKind,
    read_as,
)
from loramux.adapters.payload_sum import PayloadSum
from loramux.errors import AdapterInvalid, ConfigError
from loramux.wire import TABLE_MODULES, BaseDescription

IMPORTER_VERSION = 6
"""Raise it whenever import or packing would turn the same upload into other bytes."""
MIN_CHUNK, MAX_CHUNK = 16, 128
_ORDER = (
    ("embed_tokens",),
    ("input_layernorm",),
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("post_attention_layernorm",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
    ("norm",),
    ("lm_head",),
)
"""Modules that read the same input, in the order they run."""

_MAGIC = b"loramux\x00"
_FORMAT_VERSION = 5
_PREFIX = struct.Struct("<8sII32s")
_ALIGN = 4096
_MAX_HEADER_BYTES = 1 << 24
_FINGERPRINT = re.compile(r"[0-9A-Za-z_-]+")

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything is in a stream, in elements. Tables are [num_layers, len(TABLE_MODULES)],
    and ``vector_offset`` has an axis more: VECTOR_KINDS. Those of token rows are [2]: embed_tokens,
    lm_head.

    A module without a pair has rank 0, scale 0 and offsets 0; a vector or a middle that is not
    there has -1. Where there is a middle, A and B are not in this stream and have offsets 0.
    """

    dtype: Dtype
    chunk: int
    num_elems: int
    a_offset: Int64
    b_offset: Int64
    middle_offset: Int64
    rank: Int32
    scale: Float32
    vector_offset: Int64
    token_ids_offset: Int64
    token_rows_offset: Int64
    num_token_rows: Int32

    @property
    def num_layers(self) -> int:
        """Layers of the base."""
        return len(self.rank)

    @property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return int(self.rank.max(initial=0))

    @property
    def num_bytes(self) -> int:
        """Size of the stream."""
        return self.num_elems * ITEMSIZE[self.dtype]

    def layer_ends(self) -> Int64:
        """So many elements from the stream's beginning do layers 0 to l need: [num_layers]."""
        # A layer begins with the first thing no layer before has: that ends all before it.
        own = (self.rank > 0) & (self.middle_offset < 0)
        halves = [np.where(own, half, -1) for half in (self.a_offset, self.b_offset)]
        vectors = self.vector_offset.reshape(self.num_layers, -1)
        has = np.concatenate([*halves, self.middle_offset, vectors], axis=1)
        before = np.append(-1, np.maximum.accumulate(has.max(axis=1))[:-1])
        starts = np.where(has > before[:, None], has, self.num_elems).min(axis=1)
        later = np.append(starts[1:], self.num_elems)
        return np.minimum.accumulate(later[::-1])[::-1]

    def num_slices(self, slice_bytes: int) -> int:
        """Pool slices the stream covers; the last may be partly used."""
        slice_elems = slice_bytes // ITEMSIZE[self.dtype]
        return -(-self.num_elems // slice_elems)

    def num_frames(self, slice_bytes: int, frame_slices: int = 0) -> int:
        """Pool frames that hold those slices; 0: a frame has one slice per layer of the base."""
        return -(-self.num_slices(slice_bytes) // (frame_slices or self.num_layers))


@dataclass(frozen=True, eq=False)
class PackedAdapter(Layout):
    """The header of a packed file. The payload is ``num_bytes`` at ``payload_offset``."""

    path: Path
    digest: str
    fingerprint: str
    importer_version: int
    basis: str | None
    payload_sum: str
    payload_offset: int

    def after(self, basis: Layout, num_bytes: int) -> Layout:
        """Where everything is when the stream of its ``basis`` comes first and takes up
        ``num_bytes``, this one's follows, and both are one stream."""
        first = num_bytes // ITEMSIZE[self.dtype]
        shared = self.middle_offset >= 0
        return replace(
            self,
            num_elems=first + self.num_elems,
            a_offset=np.where(shared, basis.a_offset, first + self.a_offset),
            b_offset=np.where(shared, basis.b_offset, first + self.b_offset),
            middle_offset=np.where(shared, first + self.middle_offset, -1),
            vector_offset=np.where(self.vector_offset >= 0, first + self.vector_offset, -1),
            token_ids_offset=first + self.token_ids_offset,
            token_rows_offset=first + self.token_rows_offset,
        )


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """Tables are those of a layout: their shape, and their little-endian bytes row by row."""

    digest: str
    fingerprint: str
    importer_version: int
    basis: str | None
    dtype: Dtype
    chunk: int
    num_elems: int
    num_layers: int
    tables: dict[str, tuple[list[int], bytes]]
    payload_sum: str


_TABLES = {
    "a_offset": "<i8",
    "b_offset": "<i8",
    "middle_offset": "<i8",
    "rank": "<i4",
    "scale": "<f4",
    "vector_offset": "<i8",
    "token_ids_offset": "<i8",
    "token_rows_offset": "<i8",
    "num_token_rows": "<i4",
}
"""Those of a layout, as the header has them."""


def packed_path(data_dir: Path, digest: str, fingerprint: str) -> Path:
    """Where the packed form of an adapter version for a base is, or would be."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ConfigError("a base fingerprint is made of letters, digits, '-' and '_'")
    name = f"{check_digest(digest)}-{fingerprint[:16]}-v{IMPORTER_VERSION}.lmx"
    return data_dir / "packed" / name


def chunk_elems(widths: Mapping[str, tuple[int, int]], slice_bytes: int, itemsize: int) -> int:
    """Elements in a chunk, the unit that no slice boundary cuts.

    The largest power of two from 16 to 128 that divides a slice and every width; 16 when there is
    none, and then vectors are padded. ConfigError when a slice is not whole chunks of 16.
    """
    slice_elems, rest = divmod(slice_bytes, itemsize)
    if rest or slice_elems % MIN_CHUNK:
        raise ConfigError(
            f"a pool slice of {slice_bytes} bytes is not a multiple of {MIN_CHUNK} elements of "
            f"{itemsize} bytes: choose page_tokens so that it is"
        )
    sizes = [slice_elems, *(width for pair in widths.values() for width in pair)]
    chunk = MAX_CHUNK
    while chunk > MIN_CHUNK and any(size % chunk for size in sizes):
        chunk //= 2
    return chunk


def lay_out(adapter: CanonicalAdapter, base: BaseDescription) -> Layout:
    """Give every matrix of the adapter its place in the stream."""
    chunk = chunk_elems(base.widths, base.slice_bytes, ITEMSIZE[adapter.dtype])
    shape = (base.num_layers, len(TABLE_MODULES))
    layout = Layout(
        adapter.dtype,
        chunk,
        num_elems=0,
        a_offset=np.zeros(shape, np.int64),
        b_offset=np.zeros(shape, np.int64),
        middle_offset=np.full(shape, -1, np.int64),
        rank=np.zeros(shape, np.int32),
        scale=np.zeros(shape, np.float32),
        vector_offset=np.full((*shape, len(VECTOR_KINDS)), -1, np.int64),
        token_ids_offset=np.zeros(2, np.int64),
        token_rows_offset=np.zeros(2, np.int64),
        num_token_rows=np.zeros(2, np.int32),
    )
    for pair in adapter.pairs:
        at = pair.layer, TABLE_MODULES.index(pair.module)
        layout.rank[at], layout.scale[at] = pair.rank, pair.scale
    end = 0
    placed: dict[tuple[Part, int], int] = {}
    for (layer, module, part), source in _pieces(adapter, base).items():
        count, width = _shape(part, source)
        at = layer, TABLE_MODULES.index(module)
        start = placed.setdefault((part, id(source)), end)
        if part == "A":
            layout.a_offset[at] = start
        elif part == "B":
            layout.b_offset[at] = start
        elif part == "R":
            layout.middle_offset[at] = start
        elif part == "ids":
            layout.token_ids_offset[TOKEN_MODULES.index(module)] = start
        elif part == "rows":
            layout.token_rows_offset[TOKEN_MODULES.index(module)] = start
        else:
            layout.vector_offset[*at, VECTOR_KINDS.index(part)] = start
        if start == end:
            end += count * _padded(width, chunk)
    for tokens in adapter.tokens:
        layout.num_token_rows[TOKEN_MODULES.index(tokens.module)] = len(tokens.ids)
    return replace(layout, num_elems=end)


def pack(
    adapter: CanonicalAdapter,
    base: BaseDescription,
    digest: str,
    path: Path,
    *,
    basis: str | None = None,
) -> Layout:
    """Write the packed file, whole or not at all; where everything is in it.

    ``basis`` is the digest of the basis if pairs have middles: its own file has to be there first.
    Memory is bounded by one matrix. Raises StorageFull.
    """
    layout = lay_out(adapter, base)
    tables = {name: getattr(layout, name).astype(kind) for name, kind in _TABLES.items()}
    header = _Header(
        digest=digest,
        fingerprint=base.fingerprint,
        importer_version=IMPORTER_VERSION,
        basis=basis,
        dtype=layout.dtype,
        chunk=layout.chunk,
        num_elems=layout.num_elems,
        num_layers=layout.num_layers,
        tables={name: (list(table.shape), table.tobytes()) for name, table in tables.items()},
        payload_sum=PayloadSum().hexdigest(),
    )
    temporary = path.with_name(f"{secrets.token_hex(16)}.tmp")
    with disk_errors():
        make_durable_dir(path.parent)
        try:
            with open(temporary, "xb") as file:
                # The sum is known at the end; every sum is as long, so the header keeps its size.
                file.seek(_payload_offset(msgspec.msgpack.encode(header)))
                payload_sum = PayloadSum()
                for values in _stream(adapter, base, layout.chunk):
                    data = values.data.cast("B")
                    payload_sum.update(data)
                    file.write(data)
                header = msgspec.structs.replace(header, payload_sum=payload_sum.hexdigest())
                encoded = msgspec.msgpack.encode(header)
                file.seek(0)
                file.write(_prefix(encoded) + encoded)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return layout


def read_header(path: Path) -> PackedAdapter:
    """The header of a packed file; the payload's sum is left to whoever reads the payload.

    Raises FileNotFoundError, and AdapterInvalid (packed_file_invalid) for a file that is not a
    packed adapter, is of another format version, or is cut short or damaged before the payload.
    """
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            raise _invalid("it is not a packed adapter")
        _, version, length, sha256 = _PREFIX.unpack(prefix)
        if version != _FORMAT_VERSION:
            raise _invalid(f"it has format version {version}, not {_FORMAT_VERSION}")
        encoded = file.read(length) if length <= _MAX_HEADER_BYTES else b""
        if len(encoded) != length or hashlib.sha256(encoded).digest() != sha256:
            raise _invalid("its header is damaged")
        file_bytes = os.fstat(file.fileno()).st_size
    header = msgspec.msgpack.decode(encoded, type=_Header)
    tables: dict[str, Any] = {
        name: np.frombuffer(data, _TABLES[name]).reshape(shape)
        for name, (shape, data) in header.tables.items()
    }
    packed = PackedAdapter(
        dtype=header.dtype,
        chunk=header.chunk,
        num_elems=header.num_elems,
        **tables,
        path=path,
        digest=header.digest,
        fingerprint=header.fingerprint,
        importer_version=header.importer_version,
        basis=header.basis,
        payload_sum=header.payload_sum,
        payload_offset=_payload_offset(encoded),
    )
    if file_bytes != packed.payload_offset + packed.num_bytes:
        raise _invalid(f"it has {file_bytes} bytes, its header says otherwise")
    return packed


def verify_payload(packed: PackedAdapter) -> bool:
    """Whether the payload still has the sum it was written with. Reads all of it."""
    actual = PayloadSum()
    with open(packed.path, "rb") as file:
        file.seek(packed.payload_offset)
        while block := file.read(READ_BYTES):
            actual.update(memoryview(block))
    return actual.hexdigest() == packed.payload_sum


def delete(data_dir: Path, digest: str) -> None:
    """Remove the packed forms of an adapter version, for every base."""
    for path in (data_dir / "packed").glob(f"{check_digest(digest)}-*.lmx"):
        path.unlink(missing_ok=True)


def collect(data_dir: Path, is_used: Callable[[str], bool]) -> None:
    """Remove packed files of versions that nobody uses, and those of other importers."""
    for path in (data_dir / "packed").glob("*.lmx"):
        if not path.stem.endswith(f"-v{IMPORTER_VERSION}") or not is_used(path.name[:64]):
            path.unlink(missing_ok=True)


def sweep(data_dir: Path) -> int:
    """Remove what interrupted ``pack`` calls left; how many files. Call before packing starts."""
    leftovers = list((data_dir / "packed").glob("*.tmp"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


Part = VectorKind | Literal["A", "R", "B", "ids", "rows"]
_PARTS: tuple[Part, ...] = ("input_gain", "A", "R", "gain", "shift", "B", "ids", "rows")
Piece = tuple[int, str, Part]
Source = Matrix | Array


def _pieces(adapter: CanonicalAdapter, base: BaseDescription) -> dict[Piece, Source]:
    """All that the adapter has, (layer, module, part), in stream order."""
    found: dict[Piece, Source] = {}
    for pair in adapter.pairs:
        if pair.middle is not None:
            found[pair.layer, pair.module, "R"] = pair.middle
            continue
        found[pair.layer, pair.module, "A"] = pair.a
        found[pair.layer, pair.module, "B"] = pair.b
    for vector in adapter.vectors:
        found[vector.layer, vector.module, vector.kind] = vector.values
    for tokens in adapter.tokens:
        layer = 0 if tokens.module == "embed_tokens" else base.num_layers - 1
        found[layer, tokens.module, "ids"] = tokens.ids
        found[layer, tokens.module, "rows"] = tokens.rows
    order = [
        (layer, module, part)
        for layer in range(base.num_layers)
        for site in _ORDER
        for part in _PARTS
        for module in site
    ]
    return {piece: found[piece] for piece in order if piece in found}


def _shape(part: Part, source: Source) -> tuple[int, int]:
    """How many vectors a piece is, and how wide they are."""
    if part in ("A", "R", "rows"):
        return source.shape[0], source.shape[1]
    if part == "B":
        return source.shape[1], source.shape[0]
    return 1, source.shape[0]


def _stream(adapter: CanonicalAdapter, base: BaseDescription, chunk: int) -> Iterator[Array]:
    """The stream's pieces, [vectors, padded width] each, in ``STORAGE[adapter.dtype]``."""
    written = set()
    for (_, _, part), source in _pieces(adapter, base).items():
        if (part, id(source)) in written:
            continue
        written.add((part, id(source)))
        count, width = _shape(part, source)
        values = source if isinstance(source, np.ndarray) else read_as(source, adapter.dtype)
        if part == "ids":  # integers among floats: their bits
            values = values.astype("<i4").view("<f4")
        padded = np.zeros((count, _padded(width, chunk)), STORAGE[adapter.dtype])
        padded[:, :width] = values.T if part == "B" else values
        yield padded


def _padded(width: int, chunk: int) -> int:
    return -(-width // chunk) * chunk


def _payload_offset(encoded_header: bytes) -> int:
    return _padded(_PREFIX.size + len(encoded_header), _ALIGN)


def _prefix(encoded: bytes) -> bytes:
    sha256 = hashlib.sha256(encoded).digest()
    return _PREFIX.pack(_MAGIC, _FORMAT_VERSION, len(encoded), sha256)


def _invalid(reason: str) -> AdapterInvalid:
    text = f"the packed adapter file cannot be used: {reason}"
    return AdapterInvalid(text, problems=[text], code="packed_file_invalid")
