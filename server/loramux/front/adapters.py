"""Names to digests, uploads, and the life of an adapter: validating, ready or failed, deleting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loramux.request import Adapters

Status = Literal["receiving", "validating", "ready", "failed", "deleting", "incompatible"]


class AdapterView(msgspec.Struct, kw_only=True):
    """An adapter as HTTP shows it. ``report`` is what the import found; ``error`` why it failed
    (``{"code", "message", "problems"}``). ``created`` is Unix seconds."""

    id: str
    object: str = "adapter"
    name: str
    digest: str
    generation: int
    status: Status
    residency: Literal["pool", "disk"] = "disk"
    pinned: bool = False
    created: int = 0
    rank: int = 0
    num_bytes: int = 0
    num_frames: int = 0
    report: dict[str, Any] = {}
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Served:
    """What a ``model`` string means now. The base has no adapters, digest "" and generation 0."""

    adapters: Adapters
    name: str
    digest: str
    generation: int


class UploadWriter:
    """A weights file on its way in; bytes are hashed and written on a thread."""

    async def write(self, data: bytes) -> None:
        """Raises PayloadTooLarge at the limit byte, StorageFull when the disk is full."""
        raise NotImplementedError

    async def commit(self) -> str:
        """Make the file durable; its SHA-256 (64 lower-case hex)."""
        raise NotImplementedError

    async def abort(self) -> None:
        """Leave nothing behind. Idempotent, and harmless after commit."""
        raise NotImplementedError


class AdapterService:
    """Every adapter this server knows. Synchronous methods read memory and never block."""

    def resolve(self, model: str) -> Served:
        """The base's name, ``name``, ``name@generation`` or ``name@sha256:<12 or more hex>``.

        Raises NotFound (model_not_found), GenerationGone, or Conflict: adapter_not_ready (with
        retry_after_s), adapter_failed, adapter_incompatible.
        """
        raise NotImplementedError

    def list(self) -> list[AdapterView]:
        """Every adapter, by name."""
        raise NotImplementedError

    def show(self, name: str) -> AdapterView:
        """One adapter by name (newest generation) or ``name@generation``; raises NotFound."""
        raise NotImplementedError

    async def begin(self) -> UploadWriter:
        """Start receiving a weights file."""
        raise NotImplementedError

    async def create(
        self,
        name: str,
        config: bytes,
        weights_digest: str,
        *,
        validate_only: bool = False,
        wait_s: float = 0,
        expected_generation: int | None = None,
    ) -> AdapterView:
        """Register an uploaded adapter and have it validated and packed.

        Waits up to ``wait_s`` for the verdict; the view's status is "validating" when it is not in
        yet. Raises InvalidRequest (name), Conflict (generation_conflict), and AdapterInvalid when
        the verdict is in and bad. ``validate_only`` always waits and registers nothing.
        """
        raise NotImplementedError

    async def delete(self, name: str) -> AdapterView:
        """No new requests from now on; files go when the last running request ends."""
        raise NotImplementedError

    async def set_pinned(self, name: str, pinned: bool) -> AdapterView:
        """Keep it in the pool (or no longer). Raises Conflict when it is not ready."""
        raise NotImplementedError
