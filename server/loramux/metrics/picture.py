"""What the engine looks like between two steps, for a person: plain data, bounded in size.

Gathered by ``engine.picture`` when somebody asks; digests and tenants are given names, or hidden,
by the front.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Cell(IntEnum):
    """What a frame of the pool is used for. KV: also cached pages that somebody runs on. PREFIX:
    those nobody runs on. LEASED: adapters that cannot be evicted now."""

    FREE = 0
    KV = 1
    PREFIX = 2
    LEASED = 3
    WARM = 4
    LOADING = 5


class Holder(msgspec.Struct, omit_defaults=True):
    """Whose frames they are: an adapter's or a tenant's requests'."""

    digest: str | None = None
    tenant: str | None = None


class Frames(msgspec.Struct):
    """The pool as a map. A cell stands for ``per_cell`` frames in a row (the last for the rest) and
    shows what most of them are: a ``Cell`` a byte in ``cells``, and in ``held`` whose they are:
    number n is ``holders[n - 1]``, 0 nobody who is listed."""

    total: int = 0
    per_cell: int = 1
    cells: bytes = b""
    held: bytes = b""
    holders: list[Holder] = []


class Resident(msgspec.Struct):
    """An adapter in the pool. ``leases``: rows that run on it; ``idle_s``: seconds since one began
    to, None when none ever did."""

    digest: str
    model_id: int
    cell: Cell
    num_frames: int
    num_bytes: int
    leases: int
    pinned: bool
    idle_s: float | None


class Event(msgspec.Struct, frozen=True):
    """An adapter came into the pool (``load``, which took ``seconds``) or left it (``evict``)."""

    kind: str
    digest: str
    num_frames: int
    num_bytes: int
    seconds: float = 0.0
    age_s: float = 0.0


class BatchRow(msgspec.Struct):
    """A running request: ``tokens`` computed in the last step, ``guesses`` of them guessed ahead;
    ``context`` ids it has, ``outputs`` of them written; since it was queued ``drafted`` guesses
    were verified, ``accepted`` right."""

    digests: list[str]
    tenant: str
    model_id: int
    tokens: int
    guesses: int
    drafter: str
    context: int
    outputs: int
    drafted: int
    accepted: int
    age_s: float


class Waiting(msgspec.Struct):
    """Waiting requests for one list of adapters; ``reasons``: how many wait for what
    (``engine.scheduler.Wait``)."""

    digests: list[str]
    num: int = 0
    oldest_s: float = 0.0
    reasons: dict[str, int] = {}


class Picture(msgspec.Struct):
    """The lists hold the most telling entries; ``num_*`` count all there are. ``host_bytes`` of
    ``num_host`` adapters are in the pinned memory beside a device."""

    frames: Frames = msgspec.field(default_factory=Frames)
    residents: list[Resident] = []
    num_resident: int = 0
    num_host: int = 0
    host_bytes: int = 0
    in_host: list[str] = []
    events: list[Event] = []
    batch: list[BatchRow] = []
    num_running: int = 0
    queue: list[Waiting] = []
    num_waiting: int = 0
