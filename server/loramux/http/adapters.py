"""Adapters and models over HTTP: upload, list, show, pin, delete; what fits."""

from __future__ import annotations

import contextlib
import math
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request
from starlette.responses import Response

from loramux.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    Conflict,
    InvalidRequest,
    LoramuxError,
    NotFound,
    Overloaded,
    PermissionDenied,
)
from loramux.front.front import Front
from loramux.http.answers import ModelCard, encode
from loramux.http.auth import caller
from loramux.http.limits import read_json
from loramux.http.registration import MAX_TTL_S, Registration, is_json, seconds
from loramux.http.upload import Upload
from loramux.metrics.prometheus import Exporter
from loramux.wire import Ready

MAX_WAIT_S = 600.0
CAPACITY_RANKS = (8, 16, 64)


def answer(payload: Any, status: int = 200) -> Response:
    """Any struct or builtin as JSON."""
    return Response(encode(payload), status_code=status, media_type="application/json")


def owner_to_change(front: Front, request: Request, name: str) -> str:
    """Whose adapter of that name the caller may delete or pin.

    Raises PermissionDenied when it is shared and the caller no operator, and for the base.
    """
    asking = caller(request)
    if name == front.base_name:
        raise PermissionDenied("the base model stays as it is", param="name", code="base_model")
    owner = front.adapters.owner(name, tenant=asking.tenant)
    if owner != asking.tenant and not asking.is_admin:
        raise PermissionDenied("a shared adapter: changing it needs a key with the scope admin")
    return owner


class Adapters:
    """``/v1/adapters`` and ``/v1/capacity``."""

    def __init__(self, front: Front, exporter: Exporter) -> None:
        self._front, self._exporter = front, exporter

    async def create(
        self,
        request: Request,
        validate_only: bool = False,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)] = 0,
        expected_generation: Annotated[int | None, Query(ge=0, le=2**31)] = None,
        ttl_s: Annotated[int | None, Query(ge=1, le=MAX_TTL_S)] = None,
    ) -> Response:
        """Upload an adapter as multipart parts ``name``, ``config`` (adapter_config.json),
        ``weights`` (adapter_model.safetensors) and, if it has one, ``profile`` (see
        ``adapters.profile``), ``heads`` (medusa_heads.safetensors, see ``adapters.heads_file``) and
        ``base`` (target, draft or small: the model it is for), or as JSON that names files sent
        before, or in ``blend`` adapters to make it of: that is computed before the answer.

        201 when it is ready, 202 while it is being validated (``wait``: seconds to stay for the
        verdict), 200 when exactly this was there before. ``validate_only`` registers nothing.
        ``ttl_s``: seconds to live, from now on also for what was there.
        """
        front, tenant = self._front, caller(request).tenant
        adapters = front.adapters
        upload = (Registration if is_json(request) else Upload)(adapters, front.config)
        try:
            with front.quotas.uploading(tenant):
                await upload.read(request)
            expected_generation = _one(
                expected_generation, upload.expected_generation, "expected_generation"
            )
            ttl_s = _one(ttl_s, upload.ttl_s, "ttl_s")
            before = adapters.own(upload.name, tenant=tenant)
            view = await adapters.create(
                upload.name,
                upload.config,
                upload.weights_digest,
                profile=upload.profile,
                heads_digest=upload.heads_digest,
                validate_only=validate_only,
                wait_s=wait,
                expected_generation=expected_generation,
                ttl_s=ttl_s,
                tenant=tenant,
                blend=upload.blend,
                base=upload.base,
            )
        except LoramuxError as exc:
            # The front counts the verdicts on what it registered.
            if validate_only or not isinstance(exc, AdapterInvalid):
                self._exporter.uploaded(exc.code)
            raise
        finally:
            await upload.abort()
        known = before is not None and before.status == "ready" and before.digest == view.digest
        if validate_only or (known and view.status == "ready"):
            return answer(view)
        return answer(view, 201 if view.status == "ready" else 202)

    async def list(self, request: Request) -> Response:
        """Every adapter the caller sees, in every state."""
        tenant = caller(request).tenant
        return answer({"object": "list", "data": self._front.adapters.list(tenant=tenant)})

    async def show(self, request: Request, name: str) -> Response:
        """One adapter, with its profile."""
        view = self._front.adapters.show(name, tenant=caller(request).tenant)
        if view.profile_digest:
            # A damaged one must not hide what else there is to say: its digest is there.
            with suppress(AdapterLoadFailed, Conflict):
                view.profile = await self._front.voices.show(view.profile_digest)
        return answer(view)

    async def versions(self, request: Request, name: str) -> Response:
        """Every generation of a name, newest first."""
        views = self._front.adapters.versions(name, tenant=caller(request).tenant)
        return answer({"object": "list", "data": views})

    async def delete(self, request: Request, name: str) -> Response:
        """A name with all its generations, or one (``name@generation``): no new requests from now
        on; running ones end as they would."""
        tenant = owner_to_change(self._front, request, name)
        return answer(await self._front.adapters.delete(name, tenant=tenant), 202)

    async def pin(self, request: Request, name: str) -> Response:
        """Keep it in the pool."""
        tenant = owner_to_change(self._front, request, name)
        return answer(await self._front.adapters.set_pinned(name, True, tenant=tenant))

    async def unpin(self, request: Request, name: str) -> Response:
        """Let the pool decide again."""
        tenant = owner_to_change(self._front, request, name)
        return answer(await self._front.adapters.set_pinned(name, False, tenant=tenant))

    async def set_ttl(self, request: Request, name: str) -> Response:
        """``{"ttl_s": N}``: delete it in so many seconds; null: keep it. Of a bare name it is the
        generation that the name means. What an alias stands for stays until the alias moves."""
        body = await read_json(request)
        if body.keys() != {"ttl_s"}:
            raise InvalidRequest("ttl_s: this field is required, and no other", param="ttl_s")
        tenant = owner_to_change(self._front, request, name)
        view = await self._front.adapters.set_ttl(name, seconds(body["ttl_s"]), tenant=tenant)
        return answer(view)

    async def capacity(
        self, tokens: Annotated[int | None, Query(ge=0, le=2**40)] = None
    ) -> Response:
        """How many adapters fit into the pool beside ``tokens`` tokens of KV cache (default: one
        request of full length), for adapters on every linear module."""
        info = self._front.info
        if info is None:
            raise Overloaded("the engine is starting", code="engine_starting")
        pool = self._front.snapshot.stats.pool
        tokens = info.max_model_len if tokens is None else tokens
        kv_frames = math.ceil(tokens / info.page_tokens)
        free = pool.free if pool.total else info.num_frames
        reclaimable = pool.prefix + pool.adapter_warm
        return answer(
            {
                "object": "capacity",
                "frame_bytes": info.frame_bytes,
                "page_tokens": info.page_tokens,
                "frames": {
                    **msgspec.to_builtins(pool),
                    "total": info.num_frames,
                    "free": free,
                    "reclaimable": reclaimable,
                },
                "free_bytes": free * info.frame_bytes,
                "total_bytes": info.num_frames * info.frame_bytes,
                "tokens": tokens,
                "adapters": [
                    _fit(info, rank, value_bytes, kv_frames, free + reclaimable)
                    for rank in CAPACITY_RANKS
                    for value_bytes in (2, 4)
                ],
            }
        )


def _one(query: int | None, body: int | None, param: str) -> int | None:
    """What was asked in the query or in the body; both must agree."""
    if None not in (query, body) and query != body:
        raise InvalidRequest(f"{param}: the query says otherwise", param=param)
    return query if body is None else body


def _fit(info: Ready, rank: int, value_bytes: int, kv_frames: int, free: int) -> dict[str, int]:
    """One line of the table: adapters of this rank on all modules, in the file's value width."""
    base = info.base
    values = (
        base.num_layers * rank * sum(fan_in + fan_out for fan_in, fan_out in base.widths.values())
    )
    slices = math.ceil(values * value_bytes / base.slice_bytes)
    frames = math.ceil(slices / base.num_layers)
    return {
        "rank": rank,
        "value_bytes": value_bytes,
        "adapter_bytes": values * value_bytes,
        "adapter_frames": frames,
        "fit": max(0, info.num_frames - kv_frames) // frames,
        "fit_now": max(0, free - kv_frames) // frames,
    }


class Models:
    """``/v1/models``: the base, and every adapter and alias that can answer."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def list(self, request: Request) -> Response:
        """The base comes first: tools take ``data[0]`` for it."""
        adapters, tenant = self._front.adapters, caller(request).tenant
        aliases = adapters.aliases.list(tenant=tenant)
        views = [v for v in adapters.list(tenant=tenant) if v.base == "target"]
        ready = {view.name: view.created for view in views if view.status == "ready"}
        for alias in aliases:  # one takes the place of a shared adapter of its name
            ready.pop(alias.id, None)
            if any(target.status == "ready" for target in alias.targets):
                ready[alias.id] = alias.changed
        cards = [self._base(), *(self._card(name, ready[name]) for name in sorted(ready))]
        return answer({"object": "list", "data": cards})

    async def show(self, request: Request, model: str) -> Response:
        """One card; a name with a generation or digest works too."""
        adapters, tenant = self._front.adapters, caller(request).tenant
        with contextlib.suppress(NotFound):
            alias = adapters.aliases.show(model, tenant=tenant)
            return answer(self._card(model, alias.changed))
        served = adapters.resolve(model, tenant=tenant)
        if not served.adapters:
            return answer(self._base())
        return answer(self._card(model, adapters.show(served.name, tenant=tenant).created))

    def _base(self) -> ModelCard:
        front = self._front
        return ModelCard(front.base_name, front.created, front.base_name, None, self._length())

    def _card(self, name: str, created: int) -> ModelCard:
        base = self._front.base_name
        return ModelCard(name, created, base, base, self._length())

    def _length(self) -> int | None:
        info = self._front.info
        return None if info is None else info.max_model_len
