"""The engine between two steps, drawn for a person who asks. It reads and changes nothing, and
while nobody asks it costs nothing: steps keep no more than they need themselves."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice

import msgspec
import numpy as np
import numpy.typing as npt

from loramux.adapters.residency import Residency
from loramux.adapters.resident import Resident as Held
from loramux.batch import Batch
from loramux.engine.scheduler import Scheduler
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool
from loramux.metrics.picture import (
    BatchRow,
    Cell,
    Frames,
    Holder,
    Picture,
    Resident,
    Waiting,
)
from loramux.request import Request

MOST_CELLS = 4096
MOST_ADAPTERS = 64
MOST_EVENTS = 48
MOST_ROWS = 64
MOST_QUEUES = 32
MOST_ADAPTER_HOLDERS = 128
MOST_TENANT_HOLDERS = 64
"""Together with the adapters' fewer than 256: a holder is a byte."""

_CELL_OF = {
    Owner.FREE: Cell.FREE,
    Owner.KV: Cell.KV,
    Owner.PREFIX: Cell.KV,
    Owner.ADAPTER: Cell.WARM,
    Owner.LOADING: Cell.LOADING,
}
_CELLS = np.array([_CELL_OF[owner] for owner in Owner], dtype=np.uint8)

Bytes = npt.NDArray[np.uint8]


def picture(
    pool: Pool,
    residencies: Sequence[Residency],
    scheduler: Scheduler,
    batches: Sequence[Batch],
    *,
    requests_now: float,
    loads_now: float,
) -> Picture:
    """``batches`` are those of the last step; ``requests_now`` is the time by the clock of
    requests' arrivals, ``loads_now`` by that of the residencies."""
    held = [(r.model_id, digest, one) for r in residencies for digest, one in r.everything()]
    host = {digest: size for r in residencies for digest, size in r.in_host().items()}
    events = chain.from_iterable(residency.history for residency in residencies)
    newest = heapq.nlargest(MOST_EVENTS, events, key=lambda event: event[0])
    residents = [_resident(loads_now, *one) for one in held]
    return Picture(
        frames=_frames(pool, [one for _, _, one in held], scheduler.running),
        residents=heapq.nlargest(MOST_ADAPTERS, residents, key=_telling),
        num_resident=len(residents),
        num_host=len(host),
        host_bytes=sum(host.values()),
        in_host=list(islice(reversed(host), MOST_ADAPTERS)),
        events=[msgspec.structs.replace(event, age_s=loads_now - at) for at, event in newest],
        batch=_batch(scheduler.running, batches, requests_now),
        num_running=len(scheduler.running),
        queue=_queue(scheduler, requests_now),
        num_waiting=len(scheduler.waiting),
    )


def _resident(now: float, model_id: int, digest: str, one: Held) -> Resident:
    cell = Cell.LOADING if one.slot is None else Cell.WARM if one.is_idle else Cell.LEASED
    return Resident(
        digest=digest,
        model_id=model_id,
        cell=cell,
        num_frames=len(one.frames),
        num_bytes=one.packed.num_bytes,
        leases=one.leases,
        pinned=one.pinned,
        idle_s=None if one.used_at is None else now - one.used_at,
    )


def _telling(resident: Resident) -> tuple[bool, bool, float]:
    """Whom to show when not all can be: those in use or on their way, then the last used."""
    idle_s = float("inf") if resident.idle_s is None else resident.idle_s
    return resident.cell is not Cell.WARM, resident.pinned, -idle_s


def _frames(pool: Pool, held: Sequence[Held], running: Sequence[Request]) -> Frames:
    cells = _CELLS[np.frombuffer(pool.frames.owners(), dtype=np.uint8)]
    cells[pool.prefix.idle_frames()] = Cell.PREFIX
    busy = (one.frames for one in held if one.slot is not None and not one.is_idle)
    cells[list(chain.from_iterable(busy))] = Cell.LEASED
    whose = np.zeros_like(cells)
    holders: list[Holder] = []
    for tenant, pages in _pages(running):
        holders.append(Holder(tenant=tenant))
        whose[pages] = len(holders)
    for one in heapq.nlargest(MOST_ADAPTER_HOLDERS, held, key=lambda one: len(one.frames)):
        holders.append(Holder(digest=one.packed.digest))
        whose[one.frames] = len(holders)
    per_cell = -(-len(cells) // MOST_CELLS)
    if per_cell > 1:
        cells, whose = _coarser(cells, whose, per_cell)
    return Frames(
        total=pool.frames.num_frames,
        per_cell=per_cell,
        cells=cells.tobytes(),
        held=whose.tobytes(),
        holders=holders,
    )


def _pages(running: Iterable[Request]) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """The frames of the tenants' requests, for the tenants who have most."""
    tables: dict[str, list[npt.NDArray[np.int64]]] = {}
    for request in running:
        for kv in request.kvs:
            tables.setdefault(request.tenant, []).append(kv.page_table[: kv.num_pages])
    pages = [(tenant, np.concatenate(found)) for tenant, found in tables.items()]
    return heapq.nlargest(MOST_TENANT_HOLDERS, pages, key=lambda found: len(found[1]))


def _coarser(cells: Bytes, whose: Bytes, per_cell: int) -> tuple[Bytes, Bytes]:
    """Cells of ``per_cell`` frames: what most of them are, and whose the first such one is."""
    short = -len(cells) % per_cell
    nothing = len(Cell)
    blocks = np.pad(cells, (0, short), constant_values=nothing).reshape(-1, per_cell)
    owners = np.pad(whose, (0, short)).reshape(-1, per_cell)
    most = np.stack([(blocks == cell).sum(axis=1) for cell in Cell]).argmax(axis=0)
    first = (blocks == most[:, None]).argmax(axis=1)
    return most.astype(np.uint8), owners[np.arange(len(owners)), first]


def _batch(running: Sequence[Request], batches: Iterable[Batch], now: float) -> list[BatchRow]:
    last = {row.request: row for batch in batches for row in batch.rows}
    rows = []
    for request in running[:MOST_ROWS]:
        row = last.get(request)
        rows.append(
            BatchRow(
                digests=[ref.digest for ref in request.kv.adapters],
                tenant=request.tenant,
                model_id=request.kv.model_id,
                tokens=row.num_tokens if row else 0,
                guesses=len(row.drafts) if row else 0,
                drafter=row.drafter if row else "",
                context=request.num_ids,
                outputs=request.num_outputs,
                drafted=request.num_drafted,
                accepted=request.num_accepted,
                age_s=now - request.arrival,
            )
        )
    return rows


def _queue(scheduler: Scheduler, now: float) -> list[Waiting]:
    """By list of adapters, those with the oldest request first. A line waits for what its head
    waits for."""
    found: dict[tuple[str, ...], Waiting] = {}
    reasons: dict[tuple[str, ...], Counter[str]] = {}
    for line in scheduler.waiting.lines():
        head = line[0]
        key = tuple(ref.digest for ref in head.adapters)
        waiting = found.setdefault(key, Waiting(list(key)))
        waiting.num += len(line)
        waiting.oldest_s = max(waiting.oldest_s, now - head.arrival)
        reasons.setdefault(key, Counter())[scheduler.why_waiting(head).name.lower()] += len(line)
    for key, waiting in found.items():
        waiting.reasons = dict(reasons[key])
    return heapq.nlargest(MOST_QUEUES, found.values(), key=lambda waiting: waiting.oldest_s)
