"""An adapter of files that are here already, named by their digests in a JSON body, or of other
adapters, named there too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request

from loramux.adapters.profile import MAX_PROFILE_BYTES, spell
from loramux.config import ADAPTER_NAME, ServerConfig
from loramux.errors import InvalidRequest, PayloadTooLarge
from loramux.front.adapters import AdapterService
from loramux.http.auth import caller
from loramux.http.blobs import digest_in
from loramux.http.limits import read_json
from loramux.http.recipes import parse_blend
from loramux.request import MODEL_IDS, Role

FIELDS = ("name", "config", "weights")
BLEND_FIELDS = ("name", "blend")
OPTIONAL = ("profile", "heads", "base", "expected_generation", "ttl_s")
MAX_TTL_S = 10 * 366 * 86400


def is_json(request: Request) -> bool:
    """Whether an upload comes as JSON and not as multipart."""
    content_type = request.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower() == "application/json"


class Registration:
    """``{"name", "config", "weights", "profile"?, "heads"?, "base"?, "expected_generation"?,
    "ttl_s"?}``, used like ``Upload``; or with ``blend`` (see ``recipes``) in place of the files,
    which are made while it is read.

    ``config`` is a digest or the adapter_config.json itself; of the latter the file that is stored
    is the object with sorted keys and no spaces, so equal configs are one file. ``profile`` is a
    digest or the object, too; ``heads`` is a digest.
    """

    name: str
    config: bytes
    profile: bytes
    base: Role
    weights_digest: str
    heads_digest: str = ""
    expected_generation: int | None
    ttl_s: int | None
    blend: Mapping[str, Any] | None = None

    def __init__(self, adapters: AdapterService, config: ServerConfig) -> None:
        self._blobs, self._blends = adapters.blobs, adapters.blends
        self._max_config_bytes = config.max_config_bytes
        self._max_heads_bytes = config.max_heads_bytes
        self._claims = AsyncExitStack()

    async def read(self, request: Request) -> None:
        """Read the body and claim its files, which stay until ``abort``.

        Raises UnsupportedMediaType, InvalidRequest, PayloadTooLarge, and NotFound (blob_not_found)
        with the ``param`` whose file is not the caller's. A blend: also as ``Blends.made``.
        """
        body = await read_json(request)
        tenant = caller(request).tenant
        fields = BLEND_FIELDS if "blend" in body else FIELDS
        for key in body:
            if key not in fields + OPTIONAL:
                names = ", ".join(fields + OPTIONAL)
                raise InvalidRequest(f"the fields are {names} and no others")
        for key in fields:
            if key not in body:
                raise InvalidRequest(f"{key}: this field is required", param=key)
        name = body["name"]
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"name: must match {ADAPTER_NAME.pattern}", param="name")
        self.name = name
        self.base = role_in(body.get("base", "target"))
        self.expected_generation = _generation(body.get("expected_generation"))
        self.profile = await self._spoken(tenant, body.get("profile"))
        self.ttl_s = seconds(body.get("ttl_s"))
        if body.get("heads") is not None:
            self.heads_digest = await self._guessing(tenant, body["heads"])
        if "blend" in body:
            if self.base != "target":
                raise InvalidRequest(
                    f"base: adapters for the {self.base} model cannot be blended", param="base"
                )
            await self._make(tenant, body["blend"])
            return
        config, weights = body["config"], body["weights"]
        self.weights_digest = _digest(weights, "weights")
        await self._claims.enter_async_context(
            self._blobs.claim(tenant, self.weights_digest, "weights")
        )
        if isinstance(config, dict):
            self.config = self._written(config)
        else:
            self.config = await self._blobs.read_small(
                tenant, _digest(config, "config"), "config", self._max_config_bytes
            )

    async def _spoken(self, tenant: str, profile: Any) -> bytes:
        if profile is not None and not isinstance(profile, dict):
            profile = await self._blobs.read_small(
                tenant, _digest(profile, "profile"), "profile", MAX_PROFILE_BYTES
            )
        return spell(profile or b"{}")

    async def _guessing(self, tenant: str, heads: Any) -> str:
        digest, limit = _digest(heads, "heads"), self._max_heads_bytes
        claim = self._blobs.claim(tenant, digest, "heads")
        if await self._claims.enter_async_context(claim) > limit:
            raise PayloadTooLarge(f"heads: exceeds {limit} bytes", param="heads")
        return digest

    async def _make(self, tenant: str, blend: Any) -> None:
        recipe, sources = parse_blend(blend)
        made = await self._claims.enter_async_context(
            self._blends.made(recipe, sources, tenant=tenant)
        )
        self.config, self.weights_digest, self.blend = made.config, made.weights_digest, made.report

    def _written(self, config: dict[str, Any]) -> bytes:
        try:
            data = json.dumps(config, allow_nan=False, sort_keys=True, separators=(",", ":"))
        except (ValueError, RecursionError):  # 1e999 is read as infinity
            raise InvalidRequest("config: not a plain JSON object", param="config") from None
        if len(data) > self._max_config_bytes:
            raise PayloadTooLarge(f"config: exceeds {self._max_config_bytes} bytes", param="config")
        return data.encode()

    async def abort(self) -> None:
        """The end of the claims."""
        await self._claims.aclose()


def role_in(value: Any) -> Role:
    """The ``base`` of an upload. Raises InvalidRequest."""
    for role in MODEL_IDS:
        if value == role:
            return role
    raise InvalidRequest(f"base: must be one of {', '.join(MODEL_IDS)}", param="base")


def _digest(value: Any, param: str) -> str:
    return digest_in(value if isinstance(value, str) else "", param)


def _generation(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value <= 2**31):
        return value
    raise InvalidRequest("expected_generation: must be an integer", param="expected_generation")


def seconds(value: Any) -> int | None:
    """A ``ttl_s``: None is for ever. Raises InvalidRequest."""
    if value is None or (type(value) is int and 1 <= value <= MAX_TTL_S):
        return value
    raise InvalidRequest(f"ttl_s: must be an integer from 1 to {MAX_TTL_S}", param="ttl_s")
