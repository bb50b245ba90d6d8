"""Large files in parts, over connections that break."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request
from starlette.responses import Response

from loramux.adapters.blobs import check_digest
from loramux.errors import InvalidRequest
from loramux.front.front import Front
from loramux.http.answers import encode
from loramux.http.auth import caller
from loramux.http.blobs import blob, body_of
from loramux.http.limits import read_json

_OFFSET = re.compile(r"[0-9]{1,18}")


class Resumable:
    """``/v1/uploads``: open, append, ask, complete, cancel."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def create(self, request: Request) -> Response:
        """``{"bytes", "sha256"}``: 201 and the upload's id."""
        body = await read_json(request)
        num_bytes, sha256 = _announced(body)
        made = await self._front.adapters.resumable.create(
            caller(request).tenant, num_bytes, sha256
        )
        payload = {
            "id": made.id,
            "object": "upload",
            "offset": 0,
            "bytes": made.num_bytes,
            "sha256": made.sha256,
            "expires_at": int(made.expires),
        }
        return Response(
            encode(payload),
            status_code=201,
            headers={"location": f"/v1/uploads/{made.id}"},
            media_type="application/json",
        )

    async def head(self, request: Request, id: str) -> Response:
        """``upload-offset`` and ``upload-length``."""
        upload, offset = await self._front.adapters.resumable.show(caller(request).tenant, id)
        headers = {
            "upload-offset": str(offset),
            "upload-length": str(upload.num_bytes),
            "cache-control": "no-store",
        }
        return Response(headers=headers)

    async def append(self, request: Request, id: str) -> Response:
        """The body goes to ``Upload-Offset``; 204 and the new one."""
        text = request.headers.get("upload-offset", "")
        if not _OFFSET.fullmatch(text):
            raise InvalidRequest(
                "Upload-Offset: this header must say where the part begins", param="Upload-Offset"
            )
        length = request.headers.get("content-length", "0")
        front, tenant = self._front, caller(request).tenant
        with front.quotas.uploading(tenant):
            offset = await front.adapters.resumable.append(
                tenant, id, int(text), int(length), body_of(request)
            )
        return Response(status_code=204, headers={"upload-offset": str(offset)})

    async def complete(self, request: Request, id: str) -> Response:
        """201: the upload has become a blob that an adapter may name."""
        done = await self._front.adapters.resumable.complete(caller(request).tenant, id)
        return blob(done.sha256, done.num_bytes, 201)

    async def cancel(self, request: Request, id: str) -> Response:
        """204, and nothing is left of it."""
        await self._front.adapters.resumable.cancel(caller(request).tenant, id)
        return Response(status_code=204)


def _announced(body: dict[str, Any]) -> tuple[int, str]:
    for key in body:
        if key not in ("bytes", "sha256"):
            raise InvalidRequest("the fields are bytes and sha256 and no others")
    num_bytes, sha256 = body.get("bytes"), body.get("sha256")
    if type(num_bytes) is not int or num_bytes < 0:
        raise InvalidRequest("bytes: must be the file's size, an integer", param="bytes")
    if not isinstance(sha256, str):
        raise InvalidRequest("sha256: must be a string", param="sha256", code="digest_malformed")
    try:
        return num_bytes, check_digest(sha256)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"sha256: {error.message}", param="sha256", code="digest_malformed"
        ) from None
