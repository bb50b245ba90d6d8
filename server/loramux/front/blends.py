"""Adapters made of adapters: the ingest process computes them, their files are registered like an
upload's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from loramux.adapters.blend import FIELDS
from loramux.config import ServerConfig
from loramux.errors import InvalidRequest, LoramuxError, Overloaded, in_short
from loramux.front.background import Background
from loramux.front.blobs import BlobService
from loramux.front.catalog import Catalog
from loramux.front.ingest_client import IngestClient
from loramux.front.verdicts import refusal
from loramux.wire import BaseDescription, BlendRecipe, BlendSource, IngestDone


@dataclass(frozen=True)
class Blended:
    """The files of a blend, and how it came about, for the adapter's report."""

    config: bytes
    weights_digest: str
    report: dict[str, Any]


class Blends:
    """Recipes to files. ``base`` is set once an engine has been ready."""

    def __init__(
        self,
        config: ServerConfig,
        catalog: Catalog,
        ingest: IngestClient,
        blobs: BlobService,
        background: Background,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._ingest = ingest
        self._blobs = blobs
        self._background = background
        self.base: BaseDescription | None = None

    @asynccontextmanager
    async def made(
        self, recipe: BlendRecipe, sources: Sequence[tuple[str, float]], *, tenant: str
    ) -> AsyncIterator[Blended]:
        """Within the block the weights' blob stays. ``sources``: what each is called (as in a
        request's ``model``) and its weight.

        Raises NotFound, GenerationGone, Conflict or InvalidRequest with the ``param`` of the source
        that is not there, not ready or not an adapter; AdapterInvalid when these cannot be blended
        so; Overloaded, ServiceError and StorageFull.
        """
        if self.base is None:
            raise Overloaded("no engine has been ready yet", code="engine_starting")
        terms = [
            self._source(name, weight, f"blend.sources[{number}].id", tenant)
            for number, (name, weight) in enumerate(sources)
        ]
        held = [digest for term in terms for digest in (term.config_digest, term.weights_digest)]
        # From here to the holds nothing is awaited: what the catalog says is ready has its files.
        for digest in held:
            self._blobs.holds.hold(digest)
        try:
            done = await self._blend(terms, recipe, self.base)
            self._blobs.holds.hold(done.digest)
            held.append(done.digest)
            if not await self._background.on_disk(self._blobs.has, done.digest):
                # The same bytes were another adapter's, which went before the hold was there.
                await self._blend(terms, recipe, self.base)
            fields = {name: getattr(recipe, name) for name in FIELDS[recipe.method]}
            if not recipe.rank:
                fields.pop("rank", None)
            report = {
                "method": recipe.method,
                **fields,
                "sources": [
                    {
                        "id": term.name,
                        "digest": term.digest,
                        "weight": term.weight,
                    }
                    for term in terms
                ],
                **done.report,
            }
            yield Blended(done.config, done.digest, report)
        finally:
            for digest in held:
                self._blobs.let_go(digest)

    def _source(self, name: str, weight: float, param: str, tenant: str) -> BlendSource:
        alias = self._catalog.alias(name, tenant=tenant)
        if alias is not None and len(alias.targets) > 1:
            raise InvalidRequest(f"{param}: an alias of several adapters: name one", param=param)
        try:
            served = self._catalog.resolve(name, tenant=tenant)
        except LoramuxError as error:
            error.param = param
            raise
        if not served.adapters:
            raise InvalidRequest(f"{param}: the base model is no adapter", param=param)
        digest = served.adapters[0].digest
        row = next(row for row in self._catalog.rows() if row.digest == digest)
        return BlendSource(
            name=served.version,
            digest=digest,
            config_digest=row.config_digest,
            weights_digest=row.weights_digest,
            weight=weight,
        )

    async def _blend(
        self, sources: Sequence[BlendSource], recipe: BlendRecipe, base: BaseDescription
    ) -> IngestDone:
        limit = self._config.max_adapter_file_bytes
        done = await self._ingest.blend(sources, recipe, base, limit_bytes=limit)
        if not done.problems:
            return done
        raise refusal(done.code, in_short(done.problems), done.problems)
