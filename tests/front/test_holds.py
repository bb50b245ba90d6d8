"""A blob goes when nobody needs it, and not one moment too early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loramux.adapters.blobs import BlobStore
from loramux.front.holds import BlobHolds


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def put(store: BlobStore, data: bytes = b"x") -> str:
    with store.writer(9) as writer:
        writer.write(data)
        return writer.commit()


def test_held_used_or_gone(store: BlobStore) -> None:
    used: set[str] = set()
    holds, digest = BlobHolds(store, used.__contains__), put(store)
    holds.hold(digest)
    holds.hold(digest)
    assert not holds.let_go(digest)
    holds.collect(digest)
    assert store.has(digest), "held once still"
    assert holds.let_go(digest)
    used.add(digest)
    holds.collect(digest)
    assert store.has(digest), "an adapter's"
    used.clear()
    holds.collect(digest)
    assert not store.has(digest)
    holds.collect(digest)


def test_an_upload_of_what_is_just_being_collected(store: BlobStore) -> None:
    """Its file comes between the question whether anyone needs the old one and the deletion."""
    digest = put(store)
    meanwhile: list[Callable[[], object]] = [lambda: holds.hold(digest), lambda: put(store)]

    def is_used(_: str) -> bool:
        for step in meanwhile:
            step()
        return False

    holds = BlobHolds(store, is_used)
    holds.collect(digest)
    assert store.has(digest)
