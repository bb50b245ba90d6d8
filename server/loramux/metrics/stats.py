"""What the engine tells about itself with every step: plain numbers, no exporter in sight."""

from __future__ import annotations

from typing import Literal

import msgspec


class PoolStats(msgspec.Struct):
    """Frames by owner. ``free + kv + prefix + adapter_leased + adapter_warm + loading == total``.

    ``prefix`` counts pages nobody runs on (reclaimable); pages shared with running rows are ``kv``.
    """

    total: int = 0
    free: int = 0
    kv: int = 0
    prefix: int = 0
    adapter_leased: int = 0
    adapter_warm: int = 0
    loading: int = 0


class AdapterLoad(msgspec.Struct, array_like=True):
    """One finished load of an adapter into the pool; ``source``: the disk, or the host's pinned
    memory beside a GPU."""

    digest: str
    seconds: float
    num_bytes: int
    source: Literal["disk", "host"] = "disk"


class StepStats(msgspec.Struct, omit_defaults=True):
    """One step of the engine. Counters are *increments since the last StepStats*.

    ``batch_adapters`` is the number of distinct adapter lists in the step's batch;
    ``resident`` lists the digests now in the pool, ``pinned`` those that stay there and
    ``waiting_adapters`` those that waiting requests need; None: as told before. While rows run
    they are told no more than once a second.
    ``oldest_waiting_s`` is how long the one waits that waits longest for its first step; None: as
    told before, and older by now. ``evictions`` count adapters and prefix pages,
    ``adapter_evictions`` the adapters by reason: room for ``kv`` or for another ``adapter``, or it
    was ``removed``. ``nan_aborts`` are requests that ended because their logits were not finite,
    ``shortages`` what found no memory and is tried again: batches, guesses, loads of adapters.
    ``drafted`` and ``accepted`` count guessed tokens by drafter: all, and those that were right.
    Times: seconds of wall clock in this step by phase (schedule, forward, sample, commit);
    ``arrival_wait_s`` of that a device stood still for adapters that were still arriving.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_loading: int = 0
    pool: PoolStats = msgspec.field(default_factory=PoolStats)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    nan_aborts: int = 0
    shortages: int = 0
    batch_rows: int = 0
    batch_tokens: int = 0
    batch_adapters: int = 0
    loads: list[AdapterLoad] = []
    evictions: dict[str, int] = {}
    adapter_evictions: dict[str, int] = {}
    oldest_waiting_s: float | None = None
    resident: list[str] | None = None
    pinned: list[str] | None = None
    waiting_adapters: list[str] | None = None
    drafted: dict[str, int] = {}
    accepted: dict[str, int] = {}
    phase_s: dict[str, float] = {}
    arrival_wait_s: float = 0.0

    def count_drafts(self, drafter: str, drafted: int, accepted: int) -> None:
        """A row's guesses were verified."""
        self.drafted = self.drafted | {drafter: self.drafted.get(drafter, 0) + drafted}
        self.accepted = self.accepted | {drafter: self.accepted.get(drafter, 0) + accepted}
