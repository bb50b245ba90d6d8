"""What many adapters share: the A and B of their pairs that have a middle, kept once.

In LoRA-XS (arXiv 2405.17604) A and B come from the base's own singular vectors, so that all
adapters of one base and rank have the same and only R [rank, rank] is trained. A basis is named by
its content and packed like an adapter; on the disk and in the pool there is one of each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loramux.adapters.canonical import CanonicalAdapter, read_as
from loramux.adapters.pack import lay_out, pack, packed_path, read_header, verify_payload
from loramux.errors import AdapterInvalid
from loramux.wire import BaseDescription

_DOMAIN = b"loramux/basis/1"


@dataclass(frozen=True)
class Basis:
    """The shared pairs as an adapter of their own, of scale 1 and without middles."""

    digest: str
    pairs: CanonicalAdapter


def shared_of(adapter: CanonicalAdapter) -> CanonicalAdapter | None:
    """The pairs of an adapter that are a basis; None when none of them has a middle."""
    shared = [pair for pair in adapter.pairs if pair.middle is not None]
    alone = tuple(replace(pair, scale=1.0, middle=None) for pair in shared)
    return CanonicalAdapter(adapter.dtype, alone) if alone else None


def basis_of(adapter: CanonicalAdapter) -> Basis | None:
    """The basis of an adapter, if it has one. Reads all of it.

    The digest is SHA-256 over dtype, places and shapes, then the bytes of A and B, pair after pair.
    """
    shared = shared_of(adapter)
    if shared is None:
        return None
    places = [(pair.layer, pair.module, pair.a.shape, pair.b.shape) for pair in shared.pairs]
    head = msgspec.msgpack.encode((adapter.dtype, places))
    digest = hashlib.sha256(_DOMAIN + len(head).to_bytes(8, "little") + head)
    for pair in shared.pairs:
        for matrix in (pair.a, pair.b):
            digest.update(np.ascontiguousarray(read_as(matrix, adapter.dtype)).data)
    return Basis(digest.hexdigest(), shared)


def keep(basis: Basis, base: BaseDescription, data_dir: Path) -> None:
    """Pack it unless it is there and whole. Two that do so at once write the same. Raises
    StorageFull."""
    path = packed_path(data_dir, basis.digest, base.fingerprint)
    if not _is_whole(path):
        pack(basis.pairs, base, basis.digest, path)


def _is_whole(path: Path) -> bool:
    # An adapter that cannot be loaded is packed again, and it may be this that was damaged.
    try:
        return verify_payload(read_header(path))
    except (OSError, AdapterInvalid):
        return False


def facts(basis: Basis, base: BaseDescription) -> dict[str, Any]:
    """What a report says of it: its bytes and frames are taken once for all that share it."""
    layout = lay_out(basis.pairs, base)
    return {
        "digest": basis.digest,
        "num_bytes": layout.num_bytes,
        "num_frames": layout.num_frames(base.slice_bytes, base.frame_slices),
    }
