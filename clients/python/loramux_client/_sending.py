"""Getting an adapter's files to the server: not at all when it has them, whole when they are small,
in parts that survive broken connections when they are large."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loramux_client._errors import (
    ConnectionFailedError,
    IncompleteResponseError,
    InvalidResponseError,
    LoramuxClientError,
    RequestTimeoutError,
)
from loramux_client._files import AdapterFiles, File, Part, Progress, blocks
from loramux_client._protocol import (
    Answer,
    Flow,
    Request,
    Sleep,
    backoff_s,
    error_of,
    json_request,
    retry_delay_s,
)

WHOLE_BYTES = 64 << 20
"""Files up to this size go in one request."""
PART_BYTES = 32 << 20
MAX_STALLS = 8
"""Failures without a byte of progress between them before a resumable upload is given up."""

_BROKEN = (ConnectionFailedError, IncompleteResponseError, RequestTimeoutError)
_FOR_NOW = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Answers to a part after which the next try may fare better."""


def send(files: AdapterFiles, progress: Progress | None) -> Flow[dict[str, Any]]:
    """Make the files blobs of the caller's; ``{"config": digest, "weights": digest}``, and
    ``heads`` if there are any.

    ``progress`` counts bytes of all files; those the server has already count as sent.
    """
    parts = {"config": files.config, "weights": files.weights}
    if files.heads is not None:
        parts["heads"] = files.heads
    total = sum(file.size for file in parts.values())
    before = 0
    fields: dict[str, Any] = {}
    for name, file in parts.items():

        def sent(num_bytes: int, before: int = before) -> None:
            if progress:
                progress(before + num_bytes, total)

        sha256 = yield from _digest(file)
        fields[name] = f"sha256:{sha256}"
        if not (yield from _is_there(sha256)):
            if file.size <= WHOLE_BYTES:
                yield _request("PUT", f"/v1/blobs/{fields[name]}", Part(file, 0, file.size, sent))
            else:
                yield from _send_in_parts(file, sha256, sent)
        before += file.size
        sent(file.size)
    return fields


def _digest(file: File) -> Flow[str]:
    whole = hashlib.sha256()
    for number, block in enumerate(blocks(file, 0, file.size)):
        whole.update(block)
        if number % 4 == 3:
            yield Sleep(0)  # an event loop has others to serve
    return whole.hexdigest()


def _is_there(sha256: str) -> Flow[bool]:
    # An answer to HEAD cannot say what is wrong; the request that follows can.
    accept = frozenset({401, 403, 404})
    answer: Answer = yield Request("HEAD", f"/v1/blobs/sha256:{sha256}", accept=accept)
    return answer.status == 200


def _request(method: str, path: str, part: Part, **headers: str) -> Request:
    length = {"content-length": str(part.end - part.start)}
    return Request(method, path, headers={**length, **headers}, body=part)


def _send_in_parts(file: File, sha256: str, sent: Callable[[int], None]) -> Flow[None]:
    answer: Answer = yield json_request(
        "POST", "/v1/uploads", {"bytes": file.size, "sha256": sha256}
    )
    upload_id = answer.json().get("id")
    if not isinstance(upload_id, str):
        raise InvalidResponseError("the answer to a new upload has no id")
    path = f"/v1/uploads/{upload_id}"
    yield from _send_all(file, path, sent)
    # A second try finds no upload when the first one's answer was lost on the way.
    answer = yield Request("POST", f"{path}/complete", accept=frozenset({404}))
    if answer.status == 404 and not (yield from _is_there(sha256)):
        raise error_of(answer)


def _send_all(file: File, path: str, sent: Callable[[int], None]) -> Flow[None]:
    """Part after part; after a failure from where the server says it stands."""
    offset = stalls = 0
    known = True
    while offset < file.size:
        part = Part(file, offset, min(file.size, offset + PART_BYTES), sent)
        request = _request("PATCH", path, part, **{"upload-offset": str(offset)})
        if not known:
            request = Request("HEAD", path)
        failure: LoramuxClientError
        delay_s: float | None
        try:
            answer: Answer = yield replace(request, retry=False, accept=_FOR_NOW)
        except _BROKEN as exc:
            failure, delay_s = exc, backoff_s(stalls)
        else:
            if answer.status < 300:
                reached = _offset(answer, file)
                if known and reached <= offset:
                    raise InvalidResponseError("the upload did not grow by what was sent")
                stalls = 0 if reached > offset else stalls
                offset, known = reached, True
                continue
            failure = error_of(answer)
            moved = failure.code == "upload_offset_mismatch"
            delay_s = 0.0 if moved else retry_delay_s(answer, stalls)
        if stalls == MAX_STALLS or delay_s is None:
            raise failure
        yield Sleep(delay_s)
        known = False
        stalls += 1


def _offset(answer: Answer, file: File) -> int:
    text = answer.headers.get("upload-offset", "")
    if not text.isascii() or not text.isdigit() or int(text) > file.size:
        raise InvalidResponseError("the answer does not say where the upload stands")
    return int(text)
