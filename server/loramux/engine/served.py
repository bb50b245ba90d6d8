"""What the scheduler must know of a model whose rows it schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.memory.formats import KvFormat


class Adapters(Protocol):
    """What the scheduler needs of residency."""

    def num_frames(self, *digests: str) -> int: ...
    def num_frames_to_load(self, digest: str) -> int: ...
    def is_resident(self, digest: str) -> bool: ...
    def load(self, digest: str, *, ahead: bool = False) -> bool: ...
    def prioritize(self, wanted: Sequence[str]) -> None: ...
    def hold(self, digest: str) -> int: ...
    def lease(self, digest: str) -> int: ...
    def release(self, digest: str) -> None: ...


@dataclass(frozen=True)
class Served:
    """A model whose rows are scheduled: how its KV lies, its adapters, and whose weights it has."""

    kv: KvFormat
    adapters: Adapters
    fingerprint: str
