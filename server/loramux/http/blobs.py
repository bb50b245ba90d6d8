"""Files by their digest: whether they are here, and sending one."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request
from starlette.responses import Response

from loramux.adapters.blobs import check_digest
from loramux.errors import InvalidRequest, UnsupportedMediaType
from loramux.front.front import Front
from loramux.http.answers import encode
from loramux.http.auth import caller

PREFIX = "sha256:"


def digest_in(text: str, param: str) -> str:
    """The 64 hex digits of ``sha256:<hex>``; InvalidRequest (digest_malformed) for all else."""
    try:
        if not text.startswith(PREFIX):
            raise InvalidRequest("")
        return check_digest(text.removeprefix(PREFIX))
    except InvalidRequest:
        raise InvalidRequest(
            f"{param}: must be sha256: and 64 lower-case hexadecimal digits",
            param=param,
            code="digest_malformed",
        ) from None


def body_of(request: Request) -> AsyncIterator[bytes]:
    """The bytes as they come. Raises UnsupportedMediaType when they are encoded."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("content-encoding is not supported: send the body as it is")
    return request.stream()


def blob(digest: str, num_bytes: int, status: int) -> Response:
    """A blob the caller has."""
    payload = {"object": "blob", "digest": PREFIX + digest, "bytes": num_bytes}
    return Response(encode(payload), status_code=status, media_type="application/json")


class Blobs:
    """``/v1/blobs/sha256:<hex>``. What others have sent is not there for the caller."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def head(self, request: Request, digest: str) -> Response:
        """200 and the size as content-length, or 404."""
        digest = digest_in(digest, "digest")
        size = await self._front.adapters.blobs.size(caller(request).tenant, digest)
        return Response(headers={"content-length": str(size)})

    async def put(self, request: Request, digest: str) -> Response:
        """The body is the file. 201 when it is new, 200 when it was here."""
        digest = digest_in(digest, "digest")
        blobs, tenant = self._front.adapters.blobs, caller(request).tenant
        with self._front.quotas.uploading(tenant):
            declared = int(request.headers.get("content-length", "0"))
            fresh = await blobs.put(tenant, digest, body_of(request), declared)
        return blob(digest, await blobs.size(tenant, digest), 201 if fresh else 200)
