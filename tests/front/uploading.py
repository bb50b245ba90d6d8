"""Uploads as HTTP makes them, and what they leave on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loramux.adapters.blobs import BlobStore
from loramux.front.adapters import AdapterView
from loramux.front.front import Front

WAIT = 20.0


async def upload(
    front: Front, name: str, weights: bytes = b"weights", wait_s: float = WAIT, **config: Any
) -> AdapterView:
    """An upload as HTTP makes one. ``config`` scripts the fake ingest process."""
    expected = config.pop("expected_generation", None)
    validate_only = config.pop("validate_only", False)
    tenant = config.pop("tenant", "")
    profile = config.pop("profile", b"")
    base = config.pop("base", "target")
    writer = await front.adapters.begin()
    try:
        for start in range(0, len(weights), 3):
            await writer.write(weights[start : start + 3])
        return await front.adapters.create(
            name,
            json.dumps(config).encode(),
            await writer.commit(),
            profile=profile,
            wait_s=wait_s,
            expected_generation=expected,
            validate_only=validate_only,
            tenant=tenant,
            base=base,
        )
    finally:
        await writer.abort()


def blobs(folder: Path) -> set[str]:
    return set(BlobStore(folder / "data").digests())


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "data" / "packed").glob("*") if path.is_file()]


async def engine_said(front: Front) -> dict[str, Any]:
    return await front.command("state")
