"""HTTP by hand, for clients that behave badly."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.http.conftest import Running


_open: list[Any] = []


def close_later(thing: Any) -> None:
    """Closed when the test is over."""
    _open.append(thing)


def close_all() -> None:
    """Every socket and client a test opened; conftest calls it."""
    while _open:
        _open.pop().close()


def connect(server: Running, *, small_buffer: bool = False) -> socket.socket:
    raw = socket.socket()
    _open.append(raw)
    if small_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(10)
    raw.connect(("127.0.0.1", server.port))
    return raw


def request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: localhost",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def post(server: Running, path: str, *, small_buffer: bool = False, **body: Any) -> socket.socket:
    """Sends a JSON request and does not read the answer."""
    raw = connect(server, small_buffer=small_buffer)
    raw.sendall(request(path, json.dumps(body).encode(), "content-type: application/json"))
    return raw


def read_until(raw: socket.socket, text: bytes) -> bytes:
    seen = bytearray()
    while seen.find(text, max(0, len(seen) - 65536 - len(text))) < 0:
        data = raw.recv(65536)
        assert data, f"closed before {text!r}: {seen[-300:]!r}"
        seen += data
    return bytes(seen)


def read_all(raw: socket.socket) -> bytes:
    seen = b""
    try:
        while data := raw.recv(65536):
            seen += data
    except ConnectionResetError:
        pass
    return seen


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, Any]:
    """The error object of a whole answer with a content-length."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head, answer
    found: dict[str, Any] = json.loads(body)["error"]
    return found


def events(answer: bytes) -> list[Any]:
    """The events of a chunked answer; ``None`` for [DONE]; comments are left out."""
    at = answer.index(b"\r\n\r\n") + 4
    chunks = []
    while at < len(answer):
        end = answer.index(b"\r\n", at)
        size = int(answer[at:end], 16)
        chunks.append(answer[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    body = b"".join(chunks)
    found = []
    for block in body.split(b"\n\n"):
        if block.startswith(b"data: "):
            payload = block.removeprefix(b"data: ")
            found.append(None if payload == b"[DONE]" else json.loads(payload))
        else:
            assert block == b"" or block.startswith(b":"), block
    return found
