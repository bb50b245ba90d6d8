"""What earlier runs and the command line left: brought in when the first engine is ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from loramux.adapters.registry import AdapterRow
from loramux.config import DEMO_DIR, ServerConfig
from loramux.errors import LoramuxError
from loramux.front.adapters import CONFIG_FILE, HEADS_FILE, WEIGHTS_FILE, AdapterService
from loramux.front.catalog import AdapterView
from loramux.wire import BaseDescription

log = logging.getLogger(__name__)

MEND_S = 60.0
"""Between two attempts to make good what the engine cannot load."""


class Stock:
    """Takes stock of a service's adapters whenever an engine is ready, and sweeps for ever."""

    def __init__(self, config: ServerConfig, adapters: AdapterService) -> None:
        self._config = config
        self._adapters = adapters
        self._background = adapters.background
        self._began = False
        self._mended: dict[str, float] = {}
        self.starting_up = True
        """Until the adapters of earlier runs and of the command line have their verdicts."""

    def base_ready(
        self, base: BaseDescription, partners: Mapping[int, BaseDescription] = MappingProxyType({})
    ) -> None:
        """An engine is ready, with these models. Nothing an adapter does wrong is raised from here:
        it is listed as failed."""
        self._background.spawn(self._take(base, partners))

    async def _take(self, base: BaseDescription, partners: Mapping[int, BaseDescription]) -> None:
        adapters, first, self._began = self._adapters, not self._began, True
        try:
            await adapters.serve_for(base, partners)
            if first:
                await self._background.on_disk(adapters.collect_files)
                self._background.spawn(self._sweep_for_ever())
            self._make_good()
            if first:
                adapters.forget_deleted()
                for name, folder in configured(self._config):
                    await self._preload(name, folder)
                await adapters.verdicts.wait_all()
        finally:  # a disk that fails here must not keep the base from being served
            if first:
                self.starting_up = False

    def _make_good(self) -> None:
        """Give the engine its pins; validate, or pack again, what lacks it, each for its model."""
        self._background.spawn(self._adapters.pins.tell())
        catalog = self._adapters.shelf.catalog
        for row in catalog.rows():
            base = self._adapters.bases.find(row.base)
            if base is None or catalog.is_over(row):
                continue
            if row.status == "ready" and self._lacks(row, base):
                self._pack_again(row, base)
            if row.status == "validating":
                self._adapters.verdicts.begin(row, base)

    def _lacks(self, row: AdapterRow, base: BaseDescription) -> bool:
        # The report of a profile that was tried out by an earlier release names no companions.
        is_old = row.profile_digest and "companions" not in row.report
        return bool(is_old) or self._adapters.packed.lacks(row, base.fingerprint)

    def _pack_again(self, row: AdapterRow, base: BaseDescription) -> None:
        self._adapters.shelf.catalog.unpacked.add(row.digest)
        self._adapters.verdicts.begin(row, base)

    def mend(self, digest: str) -> None:
        """The engine could not load this version: have it packed again, from files that are hashed
        again, and meanwhile not served. Not twice in MEND_S: it may be the disk or the memory."""
        now = time.monotonic()
        if now - self._mended.get(digest, -MEND_S) < MEND_S:
            return
        self._mended[digest] = now
        for row in list(self._adapters.shelf.catalog.rows()):
            base = self._adapters.bases.find(row.base)
            if base is not None and row.digest == digest and row.status == "ready":
                log.warning("adapter %s is packed again: it could not be loaded", digest[:12])
                self._pack_again(row, base)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await self._adapters.expire()
                await self._adapters.blobs.sweep()
                await self._adapters.resumable.sweep()
            except LoramuxError as error:  # a full disk, for one
                log.warning("what has expired stays for now: %s", error.message)
            await asyncio.sleep(self._config.sweep_s)

    async def _preload(self, name: str, folder: Path) -> None:
        """Register an adapter folder of the command line."""
        try:
            files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
            if (folder / HEADS_FILE).exists():
                files.append(folder / HEADS_FILE)
            await self._adapters.register_files(name, *files)
        except (OSError, LoramuxError) as error:
            log.error("adapter %s of %s is not served: %s", name, folder, error)
            code = error.code if isinstance(error, LoramuxError) else "unreadable"
            problems = [str(error)]
            self._adapters.shelf.catalog.broken[name] = AdapterView(
                id=f"{name}@0",
                name=name,
                digest="",
                generation=0,
                status="failed",
                error={"code": code, "message": problems[0], "problems": problems},
            )


def configured(config: ServerConfig) -> list[tuple[str, Path]]:
    """The adapter folders of the demo, ``--adapters`` and ``--adapter``; of a name the last one."""
    parents = [config.adapters] if config.adapters is not None else []
    if config.model == DEMO_DIR / "base":
        parents.insert(0, DEMO_DIR / "adapters")
    found = {
        folder.name: folder
        for parent in parents
        if parent.is_dir()
        for folder in sorted(parent.iterdir())
        if (folder / CONFIG_FILE).exists()
    }
    for item in config.adapter:
        name, _, folder_name = item.partition("=")
        found[name] = Path(folder_name)
    return list(found.items())
