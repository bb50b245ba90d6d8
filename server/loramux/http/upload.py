"""An adapter upload, taken apart while it arrives: large files never exist in memory or twice on
disk, and the handler runs from the first byte on, not after the last."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loramux.adapters.profile import MAX_PROFILE_BYTES, spell
from loramux.config import ADAPTER_NAME, ServerConfig
from loramux.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from loramux.front.adapters import AdapterService
from loramux.front.uploads import UploadWriter
from loramux.http.registration import role_in
from loramux.request import Role

PARTS = ("name", "config", "weights")
OPTIONAL = ("profile", "heads", "base")
Streamed = Literal["weights", "heads"]
STREAMED: tuple[Streamed, ...] = ("weights", "heads")
_MAX_NAME_BYTES = 256
_MAX_BASE_BYTES = 64
_IDENTITY = re.compile(rb"(binary|8bit|7bit)?", re.IGNORECASE)


class Upload:
    """The parts of one upload; ``name``, ``config``, ``profile`` (b"" for none), ``base``,
    ``weights_digest`` and ``heads_digest`` ("" for none) after ``read``.

    A file name in a part is never looked at. Call ``abort`` at the end, whatever happened.
    """

    name: str
    config: bytes
    profile: bytes = b""
    base: Role = "target"
    weights_digest: str
    heads_digest: str = ""
    expected_generation: int | None = None
    ttl_s: int | None = None
    blend: None = None

    def __init__(self, adapters: AdapterService, config: ServerConfig) -> None:
        self._adapters = adapters
        self._limits = {
            "name": _MAX_NAME_BYTES,
            "config": config.max_config_bytes,
            "profile": MAX_PROFILE_BYTES,
            "base": _MAX_BASE_BYTES,
        }
        self._small: dict[str, bytearray] = {}
        self._seen: list[str] = []
        self._part = ""
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[tuple[Streamed, bytes]] = []
        self._writers: dict[Streamed, UploadWriter] = {}
        self._open = AsyncExitStack()
        self._complete = False

    async def read(self, request: Request) -> None:
        """Read the whole body.

        Raises UnsupportedMediaType, InvalidRequest (``param`` names the part), PayloadTooLarge and
        StorageFull.
        """
        content_type, options = parse_options_header(request.headers.get("content-type"))
        boundary = options.get(b"boundary", b"")
        if content_type != b"multipart/form-data" or not boundary:
            raise UnsupportedMediaType("content-type must be multipart/form-data")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("content-encoding is not supported: send the body as it is")
        try:
            parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_data,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._name_part,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
                max_header_count=8,
                max_header_size=1024,
            )
            async for chunk in request.stream():
                parser.write(chunk)
                await self._store()
        except FormParserError:
            raise InvalidRequest("not a well-formed multipart body") from None
        await self._finish()

    async def abort(self) -> None:
        """Leaves nothing of an upload that was not registered."""
        await self._open.aclose()

    async def _store(self) -> None:
        for part in STREAMED:
            if part in self._seen and part not in self._writers:
                writer = self._writers[part] = await self._adapters.begin(part)
                self._open.push_async_callback(writer.abort)
        for part, piece in self._pieces:
            await self._writers[part].write(piece)
        self._pieces.clear()

    async def _finish(self) -> None:
        if not self._complete:
            raise InvalidRequest("the multipart body ends without its closing boundary")
        for part in PARTS:
            if part not in self._seen:
                raise InvalidRequest(f"{part}: this part is required", param=part)
        try:
            self.name = self._small["name"].decode()
        except UnicodeDecodeError:
            self.name = ""
        if not ADAPTER_NAME.fullmatch(self.name):
            raise InvalidRequest(f"name: must match {ADAPTER_NAME.pattern}", param="name")
        self.config = bytes(self._small["config"])
        if "profile" in self._small:
            self.profile = spell(bytes(self._small["profile"]))
        if "base" in self._small:
            self.base = role_in(self._small["base"].decode("latin-1"))
        self.weights_digest = await self._writers["weights"].commit()
        if "heads" in self._writers:
            self.heads_digest = await self._writers["heads"].commit()

    def _begin_part(self) -> None:
        self._headers, self._part = {}, ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        name = self._header_name.lower()
        if name in self._headers:
            raise InvalidRequest("a part has the same header twice")
        self._headers[name] = self._header_value
        self._header_name = self._header_value = b""

    def _name_part(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        part = options.get(b"name", b"").decode("latin-1")
        if disposition != b"form-data" or part not in PARTS + OPTIONAL:
            raise InvalidRequest(f"the parts are {', '.join(PARTS + OPTIONAL)} and no others")
        if part in self._seen:
            raise InvalidRequest(f"{part}: this part came twice", param=part)
        if not _IDENTITY.fullmatch(self._headers.get(b"content-transfer-encoding", b"")):
            raise InvalidRequest(f"{part}: send the part as it is, not encoded", param=part)
        self._seen.append(part)
        self._part = part
        if part not in STREAMED:
            self._small[part] = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        for part in STREAMED:
            if part == self._part:
                self._pieces.append((part, data[start:end]))
                return
        store, limit = self._small[self._part], self._limits[self._part]
        if len(store) + end - start > limit:
            message = f"{self._part}: exceeds {limit} bytes"
            raise PayloadTooLarge(message, param=self._part)
        store += data[start:end]

    def _end(self) -> None:
        self._complete = True
