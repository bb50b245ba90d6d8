"""Adapters and models over HTTP: upload, list, show, pin, delete; what fits."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request
from starlette.responses import Response

from loramux.errors import AdapterInvalid, InvalidRequest, LoramuxError, NotFound, Overloaded
from loramux.front.catalog import AdapterView
from loramux.front.front import Front
from loramux.http.answers import ModelCard, encode
from loramux.http.registration import Registration, is_json
from loramux.http.upload import Upload
from loramux.metrics.prometheus import Exporter
from loramux.wire import Ready

MAX_WAIT_S = 600.0
CAPACITY_RANKS = (8, 16, 64)


def answer(payload: Any, status: int = 200) -> Response:
    """Any struct or builtin as JSON."""
    return Response(encode(payload), status_code=status, media_type="application/json")


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
    ) -> Response:
        """Upload an adapter as multipart parts ``name``, ``config`` (adapter_config.json) and
        ``weights`` (adapter_model.safetensors), or as JSON that names files sent before.

        201 when it is ready, 202 while it is being validated (``wait``: seconds to stay for the
        verdict), 200 when exactly this was there before. ``validate_only`` registers nothing.
        """
        adapters = self._front.adapters
        upload = (Registration if is_json(request) else Upload)(adapters, self._front.config)
        try:
            await upload.read(request)
            if upload.expected_generation is not None:
                if expected_generation not in (None, upload.expected_generation):
                    raise InvalidRequest(
                        "expected_generation: the query says otherwise", param="expected_generation"
                    )
                expected_generation = upload.expected_generation
            before = self._find(upload.name)
            view = await adapters.create(
                upload.name,
                upload.config,
                upload.weights_digest,
                validate_only=validate_only,
                wait_s=wait,
                expected_generation=expected_generation,
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

    def _find(self, name: str) -> AdapterView | None:
        try:
            return self._front.adapters.show(name)
        except NotFound:
            return None

    async def list(self) -> Response:
        """Every adapter, in every state."""
        return answer({"object": "list", "data": self._front.adapters.list()})

    async def show(self, name: str) -> Response:
        """One adapter."""
        return answer(self._front.adapters.show(name))

    async def delete(self, name: str) -> Response:
        """No new requests from now on; running ones end as they would."""
        return answer(await self._front.adapters.delete(name), 202)

    async def pin(self, name: str) -> Response:
        """Keep it in the pool."""
        return answer(await self._front.adapters.set_pinned(name, True))

    async def unpin(self, name: str) -> Response:
        """Let the pool decide again."""
        return answer(await self._front.adapters.set_pinned(name, False))

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
    """``/v1/models``: the base, and every adapter that can answer."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def list(self) -> Response:
        """The base comes first: tools take ``data[0]`` for it."""
        ready = [view for view in self._front.adapters.list() if view.status == "ready"]
        cards = [self._base(), *(self._card(view.name, view.created) for view in ready)]
        return answer({"object": "list", "data": cards})

    async def show(self, model: str) -> Response:
        """One card; a name with a generation or digest works too."""
        served = self._front.adapters.resolve(model)
        if not served.adapters:
            return answer(self._base())
        return answer(self._card(model, self._front.adapters.show(served.name).created))

    def _base(self) -> ModelCard:
        front = self._front
        return ModelCard(front.base_name, front.created, front.base_name, None, self._length())

    def _card(self, name: str, created: int) -> ModelCard:
        base = self._front.base_name
        return ModelCard(name, created, base, base, self._length())

    def _length(self) -> int | None:
        info = self._front.info
        return None if info is None else info.max_model_len
