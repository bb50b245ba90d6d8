"""``GET /admin/state``: the server at a glance, for the page at ``/`` and for people with curl.

Its size does not grow with the number of adapters, tenants or frames. Digests get names; tenants
appear as a keyed hash that only this process can make, and nothing tells what anybody asked for.
Many readers cost the engine one question in a quarter of a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from loramux import __version__
from loramux.adapters.registry import AdapterRow
from loramux.errors import Overloaded
from loramux.front.front import Front
from loramux.metrics.picture import Frames, Picture, Resident

CACHE_S = 0.25
MOST_ON_DISK = 16
"""Of the adapters outside the pool those with most tokens are listed."""
MOST_CODES = 24

_TOTALS = (
    "steps",
    "unfinished",
    "prompt_tokens",
    "generation_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "adapter_loads",
    "adapter_load_bytes",
    "engine_restarts",
    "engine_epoch",
)
_COUNTS = ("evictions", "finished", "failed", "rejected", "uploads", "phase_s", "model_tokens")


class State:
    """What is drawn. ``prompts``: this listener takes prompts and uploads as well."""

    def __init__(
        self, front: Front, *, prompts: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._front = front
        self._prompts = prompts
        self._clock = clock
        self._secret = secrets.token_bytes(16)
        self._asking = asyncio.Lock()
        self._body = b""
        self._made_at = float("-inf")

    async def read(self) -> bytes:
        """The JSON, at most CACHE_S old."""
        async with self._asking:
            if self._clock() - self._made_at >= CACHE_S:
                body = msgspec.json.encode(await self._draw())
                self._body, self._made_at = body, self._clock()
            return self._body

    async def _draw(self) -> dict[str, Any]:
        front, snapshot = self._front, self._front.snapshot
        engine = await self._engine()
        picture = msgspec.convert(engine.pop("picture", {}), Picture)
        snapshot.drafts.reseat()
        drawing = _Drawing(front, picture, self._hidden)
        stats = snapshot.stats
        return {
            "version": __version__,
            "model": front.base_name,
            "prompts": self._prompts,
            "not_ready": front.not_ready(),
            "info": front.info,
            "engine": engine or None,
            "totals": {name: getattr(snapshot, name) for name in _TOTALS}
            | {name: _most(getattr(snapshot, name)) for name in _COUNTS},
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "loading": stats.num_loading,
            "pool": stats.pool,
            "frames": drawing.frames(picture.frames),
            "adapters": drawing.adapters(),
            "events": [
                {**_plain(event), "name": drawing.name(event.digest)} for event in picture.events
            ],
            "batch": drawing.batch(),
            "queue": drawing.queue(),
            "acceptance": drawing.acceptance(),
        }

    async def _engine(self) -> dict[str, Any]:
        """What the engine says of itself; nothing while there is none."""
        if self._front.info is None:
            return {}
        try:
            return dict(await self._front.command("state"))
        except Overloaded:  # it ended meanwhile
            return {}

    def _hidden(self, tenant: str) -> str:
        digest = hashlib.blake2b(tenant.encode(), key=self._secret, digest_size=4)
        return digest.hexdigest() if tenant else ""


class _Drawing:
    """One answer's names and lists."""

    def __init__(self, front: Front, picture: Picture, hidden: Callable[[str], str]) -> None:
        self._front, self._picture, self._hidden = front, picture, hidden
        self._status: Counter[str] = Counter()
        self._rows: dict[str, AdapterRow] = {}
        self._busiest = self._busy(front.snapshot.adapter_tokens)
        named = self._named()
        for row in front.adapters.rows():
            self._status[row.status] += 1
            if row.digest in named and (row.status == "ready" or row.digest not in self._rows):
                self._rows[row.digest] = row

    def _busy(self, tokens: Mapping[str, list[int]]) -> list[str]:
        resident = {one.digest for one in self._picture.residents}
        away = (d for d in tokens if d and d != "other" and d not in resident)
        return heapq.nlargest(MOST_ON_DISK, away, key=lambda digest: sum(tokens[digest]))

    def _named(self) -> set[str]:
        picture = self._picture
        lists = [row.digests for row in picture.batch] + [line.digests for line in picture.queue]
        return {
            *(digest for digests in lists for digest in digests),
            *(one.digest for one in picture.residents),
            *(event.digest for event in picture.events),
            *(holder.digest for holder in picture.frames.holders if holder.digest),
            *picture.in_host,
            *self._busiest,
            *self._front.snapshot.drafts.seats,
        }

    def name(self, digest: str) -> str:
        """What a version is called; its digest's beginning when no name means it any more."""
        if not digest:
            return self._front.base_name
        row = self._rows.get(digest)
        return f"{row.name}@{row.generation}" if row else f"sha256:{digest[:12]}"

    def _names(self, digests: Iterable[str]) -> list[str]:
        return [self.name(digest) for digest in digests]

    def frames(self, frames: Frames) -> dict[str, Any]:
        """The map, every holder with a name."""
        holders = [
            {"adapter": self.name(holder.digest)}
            if holder.digest
            else {"tenant": self._hidden(holder.tenant or "")}
            for holder in frames.holders
        ]
        return {**_plain(frames), "holders": holders}

    def adapters(self) -> dict[str, Any]:
        """Where adapters are: the pool's, then those in the host's memory, then the busiest of
        those that are on disk alone."""
        picture = self._picture
        pool = [self._row("pool", one.digest, one) for one in picture.residents]
        shown = {one.digest for one in picture.residents}
        host = [self._row("host", d) for d in picture.in_host if d not in shown]
        shown.update(picture.in_host)
        disk = [self._row("disk", digest) for digest in self._busiest if digest not in shown]
        return {
            "registered": self._status.total(),
            "by_status": dict(self._status),
            "in_pool": picture.num_resident,
            "in_host": picture.num_host,
            "host_bytes": picture.host_bytes,
            "rows": pool + host[:MOST_ON_DISK] + disk,
        }

    def _row(self, tier: str, digest: str, one: Resident | None = None) -> dict[str, Any]:
        row = self._rows.get(digest)
        report = row.report if row else {}
        prompt, written = self._front.snapshot.adapter_tokens.get(digest, (0, 0))
        return {
            "name": self.name(digest),
            "digest": digest,
            "tenant": self._hidden(row.tenant) if row else "",
            "tier": tier,
            "state": one.cell.name.lower() if one else "",
            "generation": row.generation if row else None,
            "base": row.base if row else None,
            "rank": report.get("rank"),
            "num_bytes": one.num_bytes if one else report.get("num_bytes", 0),
            "num_frames": one.num_frames if one else report.get("num_frames", 0),
            "in_flight": one.leases if one else 0,
            "pinned": one.pinned if one else False,
            "idle_s": one.idle_s if one else None,
            "tokens": prompt + written,
        }

    def batch(self) -> list[dict[str, Any]]:
        """The rows that run."""
        return [
            {
                **_plain(row, but="digests"),
                "adapters": self._names(row.digests) or [self.name("")],
                "tenant": self._hidden(row.tenant),
            }
            for row in self._picture.batch
        ]

    def queue(self) -> list[dict[str, Any]]:
        """Who waits, and for what."""
        return [
            {
                **_plain(line, but="digests"),
                "adapters": self._names(line.digests) or [self.name("")],
            }
            for line in self._picture.queue
        ]

    def acceptance(self) -> list[dict[str, Any]]:
        """What became of guesses, by drafter, then by adapter and drafter."""
        drafts = self._front.snapshot.drafts
        lines: list[tuple[str | None, Mapping[str, Any]]] = [(None, drafts.by_drafter)]
        lines += [(self.name(digest), counts) for digest, counts in drafts.seated.items()]
        return [
            {
                "adapter": name,
                "drafter": drafter,
                "steps": counts.steps,
                "drafted": counts.drafted,
                "accepted": counts.accepted,
            }
            for name, line in lines
            for drafter, counts in line.items()
        ]


def _plain(struct: msgspec.Struct, but: str = "") -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(struct)
    found.pop(but, None)
    return found


def _most(counts: Mapping[str, float]) -> dict[str, float]:
    return dict(heapq.nlargest(MOST_CODES, counts.items(), key=lambda item: item[1]))
