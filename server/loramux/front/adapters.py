"""The life of an adapter: uploads, validating, ready or failed, pins, deleting."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from loramux.adapters import heads_file
from loramux.adapters.blobs import READ_BYTES, BlobStore
from loramux.adapters.profile import MAX_PROFILE_BYTES
from loramux.adapters.registry import AdapterRow, Registry
from loramux.config import ADAPTER_NAME, ServerConfig
from loramux.errors import (
    Conflict,
    InvalidRequest,
    LoramuxError,
    NotFound,
    Overloaded,
)
from loramux.front.aliases import AliasService
from loramux.front.background import Background
from loramux.front.bases import Bases
from loramux.front.blends import Blends
from loramux.front.blobs import BlobService
from loramux.front.catalog import SHARED, AdapterView, Catalog, Served, split
from loramux.front.ingest_client import IngestClient
from loramux.front.observations import Observations
from loramux.front.packed import PackedFiles
from loramux.front.pins import Ask, Pins
from loramux.front.quotas import Quotas
from loramux.front.resumable import ResumableUploads
from loramux.front.shelf import Shelf
from loramux.front.uploads import UploadWriter
from loramux.front.verdicts import Files, Verdicts, refusal
from loramux.request import SMALL_MODEL_ID, Adapters, Role
from loramux.wire import BaseDescription

__all__ = ["AdapterService", "AdapterView", "Served", "UploadWriter"]

log = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEADS_FILE = heads_file.FILE_NAME


class AdapterService:
    """Every adapter this server knows. Synchronous methods read memory and never block.

    The registry on disk is the truth and is used on one thread; ``Catalog`` mirrors it. Validation
    needs the description of the model an adapter is for (``bases``), so uploads are refused until
    an engine has been ready once.
    """

    def __init__(
        self,
        config: ServerConfig,
        base_name: str,
        ingest: IngestClient,
        ask_engine: Ask,
        observations: Observations,
        quotas: Quotas,
    ) -> None:
        """Opens the data directory; raises ConfigError or StorageFull when it cannot be used."""
        self._config = config
        self._ask_engine = ask_engine
        self.bases = Bases()
        self._registry = Registry(config.data_dir)
        self.packed = PackedFiles(config.data_dir, self._registry)
        self._store = BlobStore(config.data_dir)
        self._store.sweep()  # now: uploads may begin before there is an engine
        self._references: Counter[str] = Counter()
        self._catalog = Catalog(base_name, observations.snapshot)
        self.pins = Pins(self._catalog, ask_engine)
        self.background = Background()
        self.shelf = Shelf(self._registry, self._catalog, self.background)
        self.blobs = BlobService(config, self._registry, self._store, self.background, quotas)
        self.verdicts = Verdicts(
            self.shelf,
            ingest,
            observations,
            self.background,
            packed=self.packed,
            pins=self.pins,
            deleted=lambda row: self._forget_soon([row]),
            failed=self.blobs.collect_files,
        )
        self.aliases = AliasService(self.shelf)
        self.blends = Blends(config, self._catalog, ingest, self.blobs, self.background)
        self.resumable = ResumableUploads(
            config, self._registry.database, self._store, self.blobs, self.background
        )

    # What names mean to a tenant: its own adapters, and under the other names the shared ones.

    def resolve(self, model: str, *, tenant: str = SHARED, user: str | None = None) -> Served:
        """The base's name, an alias, ``name``, ``name@generation`` or ``name@sha256:<12 or more
        hex>``. Of an alias's targets a ``user`` always gets the same one (see ``shares.choose``).

        Raises NotFound (model_not_found), GenerationGone, or Conflict: adapter_not_ready (with
        retry_after_s), adapter_failed, adapter_incompatible.
        """
        with self._told_apart():
            return self._catalog.resolve(model, tenant=tenant, user=user)

    def list(self, *, tenant: str = SHARED) -> list[AdapterView]:
        """What every bare name means, by name; those being deleted until they are gone."""
        return self._catalog.list(tenant=tenant)

    def show(self, name: str, *, tenant: str = SHARED) -> AdapterView:
        """One adapter by name, ``name@generation`` or ``name@sha256:<hex>``; raises NotFound."""
        with self._told_apart():
            return self._catalog.show(name, tenant=tenant)

    def versions(self, name: str, *, tenant: str = SHARED) -> Sequence[AdapterView]:
        """Every generation of a bare name, newest first; raises NotFound."""
        with self._told_apart():
            return self._catalog.versions(name, tenant=tenant)

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """What is not there, and what a server that has just started cannot know yet."""
        try:
            yield
        except NotFound:
            if self.shelf.filled:
                raise
            raise Overloaded("no engine has been ready yet", code="engine_starting") from None

    def owner(self, name: str, *, tenant: str) -> str:
        """Whose adapter a name means to the tenant: SHARED's, or its own (also when it means
        nothing)."""
        return self._catalog.owner(name, tenant=tenant)

    def own(self, name: str, *, tenant: str) -> AdapterView | None:
        """What the tenant's own bare name means; None when it has no such name."""
        return self._catalog.own(name, tenant=tenant)

    def rows(self) -> Iterator[AdapterRow]:
        """For operators: every generation of every name of every tenant."""
        return self._catalog.rows()

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

    def still_there(
        self, companions: Mapping[int, Adapters], *, adaptive: bool
    ) -> dict[int, Adapters]:
        """Of a request's companions those that are still served. Without the draft model's it gets
        the same tokens; without the small model's one that is entropy-``adaptive`` would not:
        Conflict (adapter_not_ready)."""
        kept = {}
        for model_id, adapters in companions.items():
            if all(self._catalog.serves(adapter.digest) for adapter in adapters):
                kept[model_id] = adapters
            elif adaptive and model_id == SMALL_MODEL_ID:
                raise Conflict(
                    "the adapter's companion on the small model was deleted meanwhile",
                    param="model",
                    code="adapter_not_ready",
                )
        return kept

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

    async def begin(self, param: Literal["weights", "heads"] = "weights") -> UploadWriter:
        """Start receiving a large file. The caller calls its ``abort`` in the end, always."""
        config = self._config
        limit = config.max_heads_bytes if param == "heads" else config.max_adapter_file_bytes
        return await self.blobs.begin(limit, param)

    async def create(
        self,
        name: str,
        config: bytes,
        weights_digest: str,
        *,
        profile: bytes = b"",
        heads_digest: str = "",
        validate_only: bool = False,
        wait_s: float = 0,
        expected_generation: int | None = None,
        ttl_s: int | None = None,
        tenant: str = SHARED,
        blend: Mapping[str, Any] | None = None,
        base: Role = "target",
    ) -> AdapterView:
        """Register an uploaded adapter and have it validated and packed for one of the models.

        ``profile`` is as ``adapters.profile.spell`` writes it, empty for none; ``heads_digest`` is
        that of an uploaded file of Medusa heads, "" for none; ``blend``: how the files were made
        here, for the report. Waits up to ``wait_s`` for the verdict; the view's
        status is "validating" when it is not in yet. Raises InvalidRequest (name; base, when there
        is no such model; profile and heads, which nobody would read of an adapter that is not for
        the target), PayloadTooLarge (config), NotFound (blob_not_found), QuotaExceeded, Conflict
        (generation_conflict, name_reserved), and for a bad verdict that is in AdapterInvalid, or
        StorageFull or ServiceError when only this server is to blame. ``ttl_s`` is as
        ``set_ttl``'s, for one that was there too. ``validate_only`` always waits and registers
        nothing; its view has generation 0.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"name: must match {ADAPTER_NAME.pattern}", param="name")
        if name == self._catalog.base_name:
            raise Conflict("the name is the base model's", param="name", code="name_reserved")
        model = self.bases.of(base)
        if profile and base != "target":
            raise InvalidRequest(
                f"profile: nobody speaks to an adapter for the {base} model", param="profile"
            )
        if heads_digest and base != "target":
            raise InvalidRequest(
                f"heads: nobody guesses what an adapter for the {base} model says", param="heads"
            )
        async with AsyncExitStack() as kept:
            config_digest = await self._keep(kept, "config", config, self._config.max_config_bytes)
            profile_digest = ""
            if profile:
                profile_digest = await self._keep(kept, "profile", profile, MAX_PROFILE_BYTES)
            files = (config_digest, weights_digest, profile_digest, heads_digest)
            if validate_only:
                return await self.verdicts.preview(name, files, model, blend, base=base)
            await self.shelf.expire()  # what is over takes no place
            row, fresh = await self.shelf.change(
                tenant,
                name,
                lambda: self._register(
                    tenant,
                    name,
                    files,
                    expected_generation=expected_generation,
                    ttl_s=ttl_s,
                    blend=blend,
                    base=base,
                ),
            )
        if fresh:
            if tenant == SHARED:
                self._catalog.broken.pop(name, None)
            self.verdicts.begin(row, model)
        if wait_s > 0:
            await self.verdicts.wait(row, wait_s)
        row = self._catalog.row(row)
        if row.status == "failed" and row.error is not None:
            raise refusal(row.error["code"], row.error["message"], row.error["problems"])
        return self._catalog.view(row)

    async def _keep(self, kept: AsyncExitStack, param: str, data: bytes, limit: int) -> str:
        """Store a small file, which stays at least until ``kept`` is left; its digest."""
        upload = await self.blobs.begin(limit, param)
        kept.push_async_callback(upload.abort)
        await upload.write(data)
        return await upload.commit()

    async def register_files(
        self,
        name: str,
        config_path: Path,
        weights_path: Path,
        heads_path: Path | None = None,
        *,
        wait_s: float = 0,
    ) -> AdapterView:
        """Register files of this machine; they replace what held the name.

        Raises OSError when a file cannot be read, and as ``create``.
        """
        async with AsyncExitStack() as kept:
            weights, heads = await self._take(kept, "weights", weights_path), ""
            if heads_path is not None:
                heads = await self._take(kept, "heads", heads_path)
            config = config_path.read_bytes()
            try:
                return await self.create(name, config, weights, heads_digest=heads, wait_s=wait_s)
            except Conflict:
                return await self.create(
                    name,
                    config,
                    weights,
                    heads_digest=heads,
                    wait_s=wait_s,
                    expected_generation=self._catalog.holder(name),
                )

    async def _take(
        self, kept: AsyncExitStack, param: Literal["weights", "heads"], path: Path
    ) -> str:
        """As ``_keep``, of a large file of this machine."""
        upload = await self.begin(param)
        kept.push_async_callback(upload.abort)
        with open(path, "rb") as file:
            while block := await self.background.on_uploads(file.read, READ_BYTES):
                await upload.write(block)
        return await upload.commit()

    def _register(
        self, tenant: str, name: str, files: Files, **fields: Any
    ) -> tuple[AdapterRow, bool]:
        config_digest, weights_digest, profile_digest, heads_digest = files
        for param, digest in (("weights", weights_digest), ("heads", heads_digest)):
            if digest and not self._store.has(digest):
                raise NotFound("no such blob", param=param, code="blob_not_found")
        self.blobs.storage.check_adapter(tenant, name, files)
        return self._registry.create(
            name,
            tenant=tenant,
            config_digest=config_digest,
            weights_digest=weights_digest,
            profile_digest=profile_digest,
            heads_digest=heads_digest,
            **fields,
        )

    # Pins, times to live, and deletion.

    async def set_pinned(self, name: str, pinned: bool, *, tenant: str = SHARED) -> AdapterView:
        """Keep it in the pool, or no longer. Raises NotFound, InvalidRequest for one that is not
        for the target, Conflict (not ready; no room)."""

        async def note(pin: bool) -> AdapterRow:
            return await self.shelf.change(
                tenant, name, lambda: self._registry.set_pinned(name, pin, tenant=tenant)
            )

        row = await note(pinned)
        refused = await self.pins.tell()
        if pinned and row.digest in refused:
            await note(False)
            raise refused[row.digest]
        return self._catalog.view(self._catalog.row(row))

    async def set_ttl(self, model: str, ttl_s: int | None, *, tenant: str = SHARED) -> AdapterView:
        """Have the version that ``model`` means live that many seconds from now, or for ever.

        From then on it is not found, and the sweep deletes it, pinned or not; but not while an
        alias stands for it. Raises NotFound, GenerationGone.
        """
        view = self._catalog.show(model, tenant=tenant)
        row = await self.shelf.change(
            tenant,
            view.name,
            lambda: self._registry.set_ttl(view.name, view.generation, ttl_s, tenant=tenant),
        )
        return self._catalog.view(row)

    async def expire(self) -> None:
        """Delete every version whose time is over, and end what deletions are still to be ended."""
        self._forget_soon(await self.shelf.expire())

    async def delete(self, model: str, *, tenant: str = SHARED) -> AdapterView:
        """Every generation of a name, or the one that ``name@…`` means: no new requests from now
        on; the files go when the last running request has ended.

        Raises NotFound, GenerationGone, and Conflict (adapter_pinned, adapter_aliased). The view's
        status is "deleting".
        """
        if tenant == SHARED and model in self._catalog.broken:
            return self._catalog.broken.pop(model)
        name, generation = split(model)[0], None
        if name != model:
            generation = self._catalog.show(model, tenant=tenant).generation
        rows = await self.shelf.change(
            tenant, name, lambda: self._registry.delete(name, generation=generation, tenant=tenant)
        )
        self._forget_soon(rows)
        return self._catalog.view(rows[0])

    def _forget_soon(self, rows: Iterable[AdapterRow]) -> None:
        """End those that are being deleted and that nobody uses any more."""
        for row in list(rows):
            in_use = row.digest in self._references or row.id in self.verdicts
            if row.status == "deleting" and not in_use:
                self.background.spawn(self._forget(row))

    async def _forget(self, row: AdapterRow) -> None:
        gone = await self.shelf.change(row.tenant, row.name, lambda: self._forget_row(row))
        if row.pinned:
            await self.pins.tell()  # its time was over: the engine would not evict it
        for digest in gone:
            try:
                await self._ask_engine("evict", digest)
            except LoramuxError as error:
                log.warning("could not evict %s: %s", digest[:12], error.message)

    def _forget_row(self, row: AdapterRow) -> Sequence[str]:
        """Remove the row, then the files nobody else needs; the digests that are no more, of what
        an engine may have of them."""
        self._registry.forget(row.id)
        gone = self.packed.forget(row)
        if row.heads_digest and not self._registry.uses_blob(row.heads_digest):
            gone.append(row.heads_digest)
        self.blobs.collect_files(row)
        return gone

    # Beginning and end.

    async def serve_for(
        self, base: BaseDescription, partners: Mapping[int, BaseDescription]
    ) -> None:
        """These are the models from now on: they decide which adapters are compatible."""
        self.blends.base = base
        self.bases.know(base, partners)
        self._registry.base_fingerprint = base.fingerprint
        self._registry.partner_fingerprints = self.bases.partner_fingerprints
        self.pins.forget()
        await self.shelf.refresh_all()

    def collect_files(self) -> None:
        """Remove what an earlier run left behind. On the registry's thread."""
        self.blobs.collect_all()
        self.packed.collect()

    def forget_deleted(self) -> None:
        """End the deletions that an earlier run did not come to."""
        self._forget_soon(self._catalog.deleting())

    async def stop(self) -> None:
        """Finish what runs on threads, close the registry. The ingest client is stopped before."""
        await self.background.stop()
        self._registry.close()
