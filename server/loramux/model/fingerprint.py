"""The identity of a base model: what it computes, not where it lies; no torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from loramux.model.architecture import Architecture
from loramux.model.checkpoint import weight_files

_TAG = b"loramux base 1\0"
_NOT_MATHS = ("eos_token_ids", "checkpoint_dtype", "max_position_embeddings")


def fingerprint(directory: Path, architecture: Architecture, data_dir: Path) -> str:
    """SHA-256, 64 hex characters, of the fields that change the maths and of the weight files.

    Reading gigabytes takes seconds to minutes, so each file's digest is kept in
    ``data_dir/fingerprints.json`` under its real path, size and modification time: a restart reads
    no weights. Raises ``ConfigError`` when there are no weights, ``OSError`` when a file cannot be
    read.
    """
    maths = {k: v for k, v in asdict(architecture).items() if k not in _NOT_MATHS}
    known = _read_cache(data_dir)
    keys = {_key(path): path for path in weight_files(directory)}
    digests = {key: known.get(key) or _digest(path) for key, path in keys.items()}
    if not digests.items() <= known.items():
        _write_cache(data_dir, known | digests)
    identity = hashlib.sha256(_TAG + json.dumps(maths, sort_keys=True).encode())
    for digest in digests.values():
        identity.update(bytes.fromhex(digest))
    return identity.hexdigest()


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(data_dir: Path) -> dict[str, str]:
    """What is known; an unreadable cache knows nothing, since all of it can be computed again."""
    try:
        known = json.loads((data_dir / "fingerprints.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str) and _is_digest(v)}


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _write_cache(data_dir: Path, known: dict[str, str]) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    temporary = data_dir / f".fingerprints.{os.getpid()}"
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(data_dir / "fingerprints.json")
