"""The life of an adapter: uploads, validating, ready or failed, pins, deleting."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, TypeVarTuple

from loramux.adapters.blobs import READ_BYTES, BlobStore, adapter_digest
from loramux.adapters.pack import packed_path
from loramux.adapters.registry import AdapterRow, Registry
from loramux.config import ADAPTER_NAME, DEMO_DIR, ServerConfig
from loramux.errors import (
    AdapterInvalid,
    Conflict,
    InvalidRequest,
    LoramuxError,
    NotFound,
    Overloaded,
    ServiceError,
)
from loramux.front.blobs import BlobService
from loramux.front.catalog import SHARED, AdapterView, Catalog, Served
from loramux.front.ingest_client import IngestClient
from loramux.front.observations import Observations
from loramux.front.quotas import Quotas
from loramux.front.resumable import ResumableUploads
from loramux.front.uploads import UploadWriter
from loramux.wire import BaseDescription, IngestDone

__all__ = ["AdapterService", "AdapterView", "Served", "UploadWriter"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_UPLOAD_THREADS = 4
NOT_THE_ADAPTERS_FAULT = frozenset({"storage_full", "internal_error"})
"""Verdicts that say something of this server now and nothing of the adapter."""


class AdapterService:
    """Every adapter this server knows. Synchronous methods read memory and never block.

    The registry on disk is the truth and is used on one thread; ``Catalog`` mirrors it. Validation
    needs the base's description, so uploads are refused until an engine has been ready once.
    """

    def __init__(
        self,
        config: ServerConfig,
        base_name: str,
        ingest: IngestClient,
        ask_engine: Callable[[Literal["pin", "unpin", "evict"], str], Awaitable[object]],
        observations: Observations,
        quotas: Quotas,
    ) -> None:
        """Opens the data directory; raises ConfigError or StorageFull when it cannot be used."""
        self._config = config
        self._ingest = ingest
        self._ask_engine = ask_engine
        self._observations = observations
        self._quotas = quotas
        self._base: BaseDescription | None = None
        self._catalog = Catalog(base_name, observations.snapshot)
        self._registry = Registry(config.data_dir)
        self._store = BlobStore(config.data_dir)
        self._store.sweep()  # now: uploads may begin before there is an engine
        self._verdicts: dict[int, asyncio.Task[None]] = {}
        self._references: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._uploads = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="upload")
        self.blobs = BlobService(
            config, self._registry, self._store, self._disk, self._uploads, self._spawn
        )
        self.resumable = ResumableUploads(
            config,
            self._registry.database,
            self._store,
            self.blobs,
            self._disk,
            self._uploads,
        )
        self.starting_up = True
        """Until the adapters of earlier runs and of the command line have their verdicts."""

    # What names mean to a tenant: its own adapters, and under the other names the shared ones.

    def resolve(self, model: str, *, tenant: str = SHARED) -> Served:
        """The base's name, ``name``, ``name@generation`` or ``name@sha256:<12 or more hex>``.

        Raises NotFound (model_not_found), GenerationGone, or Conflict: adapter_not_ready (with
        retry_after_s), adapter_failed, adapter_incompatible.
        """
        return self._catalog.resolve(model, tenant=tenant)

    def list(self, *, tenant: str = SHARED) -> list[AdapterView]:
        """What every bare name means, by name; those being deleted until they are gone."""
        return self._catalog.list(tenant=tenant)

    def show(self, name: str, *, tenant: str = SHARED) -> AdapterView:
        """One adapter by name, ``name@generation`` or ``name@sha256:<hex>``; raises NotFound."""
        return self._catalog.show(name, tenant=tenant)

    def owner(self, name: str, *, tenant: str) -> str:
        """Whose adapter a bare name means to the tenant: SHARED's, or its own (also when it means
        nothing)."""
        return self._catalog.owner(name, tenant=tenant)

    def own(self, name: str, *, tenant: str) -> AdapterView | None:
        """What the tenant's own bare name means; None when it has no such name."""
        return self._catalog.own(name, tenant=tenant)

    def labels(self) -> Mapping[str, Sequence[str]]:
        """For operators: digest to the names, of every tenant, that mean it now."""
        return self._catalog.labels()

    # What running requests hold.

    def require(self, digest: str) -> None:
        """Raises Conflict (adapter_not_ready) when this version is not served any more."""
        if not self._catalog.serves(digest):
            raise Conflict(
                "the adapter was deleted meanwhile", param="model", code="adapter_not_ready"
            )

    def retain(self, digest: str) -> None:
        """A request uses this version: its files stay."""
        self._references[digest] += 1

    def release(self, digest: str) -> None:
        """The request ended."""
        self._references[digest] -= 1
        if not self._references[digest]:
            del self._references[digest]
            self._forget_soon(row for row in self._catalog.deleting() if row.digest == digest)

    # Uploads.

    async def begin(self) -> UploadWriter:
        """Start receiving a weights file. The caller calls its ``abort`` in the end, always."""
        return await self.blobs.begin(self._config.max_adapter_file_bytes, "weights")

    async def create(
        self,
        name: str,
        config: bytes,
        weights_digest: str,
        *,
        validate_only: bool = False,
        wait_s: float = 0,
        expected_generation: int | None = None,
        tenant: str = SHARED,
    ) -> AdapterView:
        """Register an uploaded adapter and have it validated and packed.

        Waits up to ``wait_s`` for the verdict; the view's status is "validating" when it is not in
        yet. Raises InvalidRequest (name), PayloadTooLarge (config), NotFound (blob_not_found),
        QuotaExceeded, Conflict (generation_conflict, name_reserved), and AdapterInvalid when the
        verdict is in and bad. ``validate_only`` always waits and registers nothing; its view has
        generation 0.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"name: must match {ADAPTER_NAME.pattern}", param="name")
        if name == self._catalog.base_name:
            raise Conflict("the name is the base model's", param="name", code="name_reserved")
        if self._base is None:
            raise Overloaded("no engine has been ready yet", code="engine_starting")
        upload = await self.blobs.begin(self._config.max_config_bytes, "config")
        try:
            await upload.write(config)
            files = (await upload.commit(), weights_digest)
            if validate_only:
                return await self._validate_only(name, files, self._base)
            row, fresh = await self._on(
                self._disk, self._register, tenant, name, files, expected_generation
            )
            await self._refresh(tenant, name)
        finally:
            await upload.abort()
        if fresh:
            if tenant == SHARED:
                self._catalog.broken.pop(name, None)
            self._validate_soon(row)
        if wait_s > 0 and (verdict := self._verdicts.get(row.id)):
            await asyncio.wait([verdict], timeout=wait_s)
        row = self._catalog.row(row)
        if row.status == "failed" and row.error is not None:
            error = row.error
            raise AdapterInvalid(error["message"], problems=error["problems"], code=error["code"])
        return self._catalog.view(row)

    def _register(
        self, tenant: str, name: str, files: tuple[str, str], expected_generation: int | None
    ) -> tuple[AdapterRow, bool]:
        config_digest, weights_digest = files
        if not self._store.has(weights_digest):
            raise NotFound("no such blob", param="weights", code="blob_not_found")
        self._check_quota(tenant, name, files)
        return self._registry.create(
            name,
            tenant=tenant,
            config_digest=config_digest,
            weights_digest=weights_digest,
            expected_generation=expected_generation,
        )

    def _check_quota(self, tenant: str, name: str, files: tuple[str, str]) -> None:
        """Raises QuotaExceeded. On the registry's thread, so no two uploads take the last place."""
        rows = self._registry.list(tenant=tenant)
        held = [row for row in rows if row.status not in ("failed", "deleting")]
        digest = adapter_digest(*files)
        if any(row.name == name and row.digest == digest for row in held):
            return  # nothing is added
        sizes = [self._store.size(row.weights_digest) for row in held]
        self._quotas.check_adapters(tenant, sizes, self._store.size(files[1]))

    async def _validate_only(
        self, name: str, files: tuple[str, str], base: BaseDescription
    ) -> AdapterView:
        done = await self._ingest.examine(*files, base, pack=False)
        if done.problems:
            raise AdapterInvalid(_summary(done), problems=done.problems, code=done.code)
        return AdapterView(
            id=f"{name}@0",
            name=name,
            digest=done.digest,
            generation=0,
            status="ready",
            rank=done.report.get("rank", 0),
            num_bytes=done.report.get("num_bytes", 0),
            num_frames=done.report.get("num_frames", 0),
            report=done.report,
        )

    def _validate_soon(self, row: AdapterRow) -> None:
        if row.id not in self._verdicts:
            task = self._verdicts[row.id] = self._spawn(self._validate(row))
            task.add_done_callback(lambda _: self._verdicts.pop(row.id, None))

    async def _validate(self, row: AdapterRow) -> None:
        """Examine, and write the verdict down."""
        base = self._base
        assert base is not None
        try:
            done = await self._ingest.examine(
                row.config_digest, row.weights_digest, base, pack=True
            )
        except ServiceError as error:
            done = IngestDone(job_id=0, problems=[error.message], code=error.code)
        if row.status == "ready" and done.code in NOT_THE_ADAPTERS_FAULT and done.problems:
            log.error("could not pack %s again: %s", row.name, done.problems[0])
            return
        if not done.problems and done.digest != row.digest:
            done = IngestDone(job_id=0, problems=["its files changed on disk"], code="corrupt")
        try:
            await self._on(self._disk, self._record, row, done, base.fingerprint)
        except NotFound:  # deleted meanwhile
            self._verdicts.pop(row.id, None)
            await self._refresh(row.tenant, row.name)
            self._forget_soon([self._catalog.row(row)])
            return
        self._catalog.unpacked.discard(row.digest)
        await self._refresh(row.tenant, row.name)
        self._observations.uploaded(done.code if done.problems else "ready")
        if self._catalog.row(row).pinned:
            await self._tell_engine("pin", row.digest)

    def _record(self, row: AdapterRow, done: IngestDone, fingerprint: str) -> None:
        if done.problems:
            self._registry.mark_failed(row.id, code=done.code, problems=done.problems)
        else:
            self._registry.mark_ready(row.id, fingerprint=fingerprint, report=done.report)

    # Pins and deletion.

    async def set_pinned(self, name: str, pinned: bool, *, tenant: str = SHARED) -> AdapterView:
        """Keep it in the pool, or no longer. Raises NotFound, Conflict (not ready; no room)."""

        async def note(pin: bool) -> AdapterRow:
            row = await self._on(
                self._disk, lambda: self._registry.set_pinned(name, pin, tenant=tenant)
            )
            await self._refresh(tenant, name)
            return row

        row = await note(pinned)
        try:
            if pinned or not any(r.pinned and r.digest == row.digest for r in self._catalog.rows()):
                await self._ask_engine("pin" if pinned else "unpin", row.digest)
        except Overloaded:
            pass  # no engine now: the next one is told of every pin when it is ready
        except LoramuxError:
            await note(not pinned)
            raise
        return self._catalog.view(self._catalog.row(row))

    async def delete(self, name: str, *, tenant: str = SHARED) -> AdapterView:
        """No new requests from now on; the files go when the last running request has ended.

        Raises NotFound, and Conflict (adapter_pinned). The view's status is "deleting".
        """
        if tenant == SHARED and name in self._catalog.broken:
            return self._catalog.broken.pop(name)
        rows = await self._on(self._disk, lambda: self._registry.delete(name, tenant=tenant))
        await self._refresh(tenant, name)
        self._forget_soon(rows)
        return self._catalog.view(rows[0])

    def _forget_soon(self, rows: Iterable[AdapterRow]) -> None:
        """End those that are being deleted and that nobody uses any more."""
        for row in list(rows):
            in_use = row.digest in self._references or row.id in self._verdicts
            if row.status == "deleting" and not in_use:
                self._spawn(self._forget(row))

    async def _forget(self, row: AdapterRow) -> None:
        if not await self._on(self._disk, self._forget_row, row):
            await self._tell_engine("evict", row.digest)
        await self._refresh(row.tenant, row.name)

    def _forget_row(self, row: AdapterRow) -> bool:
        """Remove the row, then the files nobody else needs; whether the version lives on."""
        self._registry.forget(row.id)
        lives = self._registry.uses_adapter(row.digest)
        if not lives and self._base is not None:
            fingerprint = self._base.fingerprint
            packed_path(self._config.data_dir, row.digest, fingerprint).unlink(missing_ok=True)
        for digest in (row.config_digest, row.weights_digest):
            self.blobs.holds.collect(digest)
        return lives

    async def _tell_engine(self, kind: Literal["pin", "evict"], digest: str) -> None:
        try:
            await self._ask_engine(kind, digest)
        except LoramuxError as error:
            log.warning("could not %s adapter %s: %s", kind, digest[:12], error.message)

    # Beginning and end.

    def base_ready(self, base: BaseDescription) -> None:
        """An engine is ready. The first time: bring in what earlier runs and the command line left.

        Nothing an adapter does wrong is raised from here: it is listed as failed.
        """
        self._spawn(self._take_stock(base))

    async def _take_stock(self, base: BaseDescription) -> None:
        first = self._base is None
        self._base = base
        self._registry.base_fingerprint = base.fingerprint
        try:
            if first:
                await self._on(self._disk, self._collect_blobs)
                self._spawn(self._sweep_for_ever())
            await self._refresh_all()
            self._make_good(base)
            if first:
                self._forget_soon(self._catalog.deleting())
                for name, folder in configured(self._config):
                    await self._preload(name, folder)
                if self._verdicts:
                    await asyncio.wait(list(self._verdicts.values()))
        finally:  # a disk that fails here must not keep the base from being served
            if first:
                self.starting_up = False

    def _make_good(self, base: BaseDescription) -> None:
        """Give the engine its pins; validate, or pack again, what lacks it."""
        for row in self._catalog.rows():
            if row.pinned and row.status == "ready":
                self._spawn(self._tell_engine("pin", row.digest))
            path = packed_path(self._config.data_dir, row.digest, base.fingerprint)
            if row.status == "ready" and not path.exists():
                self._catalog.unpacked.add(row.digest)
                self._validate_soon(row)
            if row.status == "validating":
                self._validate_soon(row)

    def _collect_blobs(self) -> None:
        """Remove what an earlier run left behind."""
        for digest in list(self._store.digests()):
            self.blobs.holds.collect(digest)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await self.blobs.sweep()
                await self.resumable.sweep()
            except LoramuxError as error:  # a full disk, for one
                log.warning("expired uploads stay for now: %s", error.message)
            await asyncio.sleep(self._config.sweep_s)

    async def register_files(
        self, name: str, config_path: Path, weights_path: Path, *, wait_s: float = 0
    ) -> AdapterView:
        """Register two files of this machine; they replace what held the name.

        Raises OSError when a file cannot be read, and as ``create``.
        """
        upload = await self.begin()
        try:
            with open(weights_path, "rb") as file:
                while block := await self._on(self._uploads, file.read, READ_BYTES):
                    await upload.write(block)
            weights = await upload.commit()
            config = config_path.read_bytes()
            try:
                return await self.create(name, config, weights, wait_s=wait_s)
            except Conflict:
                current = self._catalog.holder(name)
                return await self.create(
                    name, config, weights, wait_s=wait_s, expected_generation=current
                )
        finally:
            await upload.abort()

    async def _preload(self, name: str, folder: Path) -> None:
        """Register an adapter folder of the command line."""
        try:
            await self.register_files(name, folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        except (OSError, LoramuxError) as error:
            log.error("adapter %s of %s is not served: %s", name, folder, error)
            code = error.code if isinstance(error, LoramuxError) else "unreadable"
            problems = [str(error)]
            self._catalog.broken[name] = AdapterView(
                id=f"{name}@0",
                name=name,
                digest="",
                generation=0,
                status="failed",
                error={"code": code, "message": problems[0], "problems": problems},
            )

    async def stop(self) -> None:
        """Finish what runs on threads, close the registry. The ingest client is stopped before."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._uploads.shutdown(wait=True)
        self._disk.shutdown(wait=True)
        self._registry.close()

    async def _refresh(self, tenant: str, name: str) -> None:
        """Bring the catalog up to the registry, for one name."""
        rows = await self._on(self._disk, lambda: self._registry.list(name, tenant=tenant))
        self._catalog.put(name, rows, tenant=tenant)

    async def _refresh_all(self) -> None:
        by_name: dict[tuple[str, str], list[AdapterRow]] = {}
        for row in await self._on(self._disk, self._registry.every):
            by_name.setdefault((row.tenant, row.name), []).append(row)
        for (tenant, name), versions in by_name.items():
            self._catalog.put(name, versions, tenant=tenant)

    async def _on(
        self, executor: ThreadPoolExecutor, function: Callable[[*Ts], T], *arguments: *Ts
    ) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("work on an adapter failed", exc_info=error)


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


def _summary(done: IngestDone) -> str:
    return done.problems[0] if len(done.problems) == 1 else f"{len(done.problems)} problems"
