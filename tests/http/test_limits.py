"""Bodies, headers and patience have bounds, and a refusal arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually
from tests.http.granting import grant

from loramux.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, STRIDE
from loramux.http.limits import parse_json

JSON = "content-type: application/json"


@pytest.fixture
def small(start: Start) -> Running:
    return start(max_body_bytes=1000, max_adapter_file_bytes=2000, max_config_bytes=100)


def body_of(size: int) -> bytes:
    body = b'{"model":"base","prompt":"a","user":"%b"}'
    return body % (b"u" * (size - len(body) + 2))


def test_the_limit_byte(small: Running) -> None:
    for chunked in (False, True):
        for size, status in ((999, 200), (1000, 200), (1001, 413), (5000, 413)):
            body = body_of(size)
            assert len(body) == size
            content = iter([body[:600], body[600:]]) if chunked else body
            answer = small.http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == status, (size, chunked)
            if status == 413:
                assert answer.json()["error"]["code"] == "payload_too_large"
                assert answer.headers["x-should-retry"] == "false"
                assert answer.headers["x-request-id"]


def test_a_declared_length_is_refused_before_any_byte_of_it(small: Running) -> None:
    raw = wire.connect(small)
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999999\r\n\r\n"
    )
    answer = wire.read_until(raw, b"}}")
    assert wire.status(answer) == 413 and b"connection: close" in answer.lower()
    assert wire.read_all(raw) == b""


def test_a_refusal_arrives_while_the_client_still_sends(small: Running) -> None:
    """Closing with unread bytes would reset the connection and lose the answer."""
    raw = wire.connect(small)
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\n".encode())
    raw.sendall(b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(64):
        raw.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
    raw.sendall(b"0\r\n\r\n")
    answer = wire.read_all(raw)
    assert wire.status(answer) == 413 and wire.error(answer)["code"] == "payload_too_large"


def test_other_refusals_read_the_body_too(small: Running) -> None:
    big = b"x" * 900
    for path, status in (("/nothing", 404), ("/v1/models", 405), ("/v1/completions", 415)):
        raw = wire.connect(small)
        raw.sendall(wire.request(path, big, "content-type: text/plain"))
        assert wire.status(wire.read_until(raw, b"}}")) == status


def test_uploads_have_their_own_limit(small: Running) -> None:
    answer = small.http.post("/v1/adapters", content=b"x" * 3000)
    assert answer.status_code == 415, "not over the limit of this route"
    raw = wire.connect(small)
    raw.sendall(b"POST /v1/adapters HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999\r\n\r\n")
    assert wire.status(wire.read_until(raw, b"}}")) == 413


def test_memory_stays_flat(model_dir: Path) -> None:
    """300 MB to a server of its own process, with and without a length; its peak must not show it.

    Takes a few seconds: the bytes really go through a socket.
    """
    script = textwrap.dedent(
        f"""
        import resource, socket
        from pathlib import Path
        from tests.http import wire
        from tests.http.conftest import launch

        server, stop = launch(Path({str(model_dir)!r}))
        server.complete()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        block = b" " * (1 << 20)
        for head in (
            b"POST /v1/completions HTTP/1.1\\r\\ncontent-length: 314572800\\r\\n",
            b"POST /v1/completions HTTP/1.1\\r\\ntransfer-encoding: chunked\\r\\n",
            b"POST /v1/adapters HTTP/1.1\\r\\ntransfer-encoding: chunked\\r\\n",
        ):
            raw = wire.connect(server)
            upload, chunked = b"adapters" in head, b"chunked" in head
            media = b"multipart/form-data; boundary=b" if upload else b"application/json"
            raw.sendall(head + b"host: localhost\\r\\ncontent-type: " + media + b"\\r\\n\\r\\n")
            if upload:
                part = b'--b\\r\\ncontent-disposition: form-data; name="weights"\\r\\n\\r\\n'
                raw.sendall(b"%x\\r\\n%b\\r\\n" % (len(part), part))
            try:
                for _ in range(300):
                    raw.sendall(b"100000\\r\\n" + block + b"\\r\\n" if chunked else block)
            except OSError:
                pass  # closed by the server, as it should
            raw.close()
        assert server.complete().status_code == 200
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        wire.close_all()
        stop()
        assert grown < 40 << 10, f"{{grown}} KiB"
        """
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )


def test_large_headers(shared: Running) -> None:
    filler = "x: " + "y" * (MAX_HEAD_BYTES // 4)
    for headers in ([filler] * 5, ["x: y"] * (MAX_HEADERS + 1), ["x: " + "y" * (1 << 20)]):
        raw = wire.connect(shared)
        try:
            raw.sendall(wire.request("/v1/completions", b"{}", *headers))
        except ConnectionResetError:
            pass  # refused before the whole megabyte was sent
        answer = wire.read_all(raw)
        if answer:
            assert wire.status(answer) == 431
            assert wire.error(answer)["code"] == "headers_too_large"
        else:
            assert len(headers) == 1, "only what was still being sent may lose its answer"
    raw = wire.connect(shared)
    raw.sendall(b"GET /version HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1))
    assert wire.status(wire.read_until(raw, b"}}")) == 431, "before the header has ended"
    raw = wire.connect(shared)
    raw.sendall(wire.request("/version", b"", filler, filler, *["x: y"] * 100, method="GET"))
    assert wire.status(wire.read_until(raw, b"}")) == 200


def test_a_large_url(shared: Running) -> None:
    raw = wire.connect(shared)
    raw.sendall(wire.request("/" + "x" * MAX_HEAD_BYTES, b"", method="GET"))
    assert wire.status(wire.read_all(raw)) == 431


@pytest.mark.parametrize(
    "junk", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http(shared: Running, junk: bytes) -> None:
    raw = wire.connect(shared)
    raw.sendall(junk)
    answer = wire.read_all(raw)
    assert wire.status(answer) == 400 and wire.error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("cut", ["at the body", "nowhere", "everywhere"])
@pytest.mark.parametrize("offer", ["h2c", "websocket"])
def test_an_offered_protocol_is_ignored(shared: Running, offer: str, cut: str) -> None:
    """Java's client offers HTTP/2 with every request. Neither is its body lost, nor is the body of
    one request read as the next."""
    raw = wire.connect(shared)
    inner = wire.request("/v1/models", b"", method="GET")
    body = json.dumps({"model": "base", "prompt": "a", "user": inner.decode()}).encode()
    offers = [
        "connection: Upgrade, HTTP2-Settings",
        f"upgrade: {offer}",
        "http2-settings: AAMAAABk",
    ]
    whole = wire.request("/v1/completions", body, JSON, *offers)
    at = whole.index(body)
    pieces = {
        "nowhere": [whole],
        "at the body": [whole[:at], whole[at:]],
        "everywhere": [whole[i : i + 1] for i in range(len(whole))],
    }[cut]
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        raw.sendall(piece)
    assert b'"text_completion"' in wire.read_until(raw, b"}}")
    raw.sendall(wire.request("/version", b"", method="GET"))
    answer = wire.read_until(raw, b"}")
    assert wire.status(answer[answer.index(b"HTTP/") :]) == 200 and b'"version"' in answer


def test_a_tunnel_is_refused(shared: Running) -> None:
    raw = wire.connect(shared)
    raw.sendall(b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert wire.status(wire.read_all(raw)) == 400


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HT", b"GET / HTTP/1.1\r\nx: y\r\n"])
def test_headers_that_never_end(start: Start, sent: bytes) -> None:
    server = start(header_timeout_s=0.2)
    raw = wire.connect(server)
    raw.sendall(sent)
    assert wire.read_all(raw) == b""
    raw = wire.connect(server)
    raw.sendall(wire.request("/version", b"", method="GET"))
    assert wire.status(wire.read_until(raw, b"}")) == 200


@pytest.mark.parametrize("sent", [b"\r\n", b"GET /ver", b"GET /version HTTP/1.1\r\nx: "])
def test_the_next_headers_have_their_time_too(start: Start, sent: bytes) -> None:
    server = start(header_timeout_s=0.4)
    raw = wire.connect(server)
    for _ in range(2):
        raw.sendall(wire.request("/version", b"", method="GET"))
        assert wire.status(wire.read_until(raw, b"}")) == 200
    raw.sendall(sent)
    assert wire.read_all(raw) == b""


def test_dripped_headers_do_not_reset_the_clock(start: Start) -> None:
    server = start(header_timeout_s=0.3)
    raw = wire.connect(server)
    cut = False
    for byte in b"GET /version HTTP/1.1\r\nhost: " + b"x" * 200:
        try:
            raw.sendall(bytes([byte]))
        except OSError:
            cut = True
            break
        time.sleep(0.02)
    assert cut


def test_the_clock_stops_with_the_headers(start: Start) -> None:
    """A body and an answer may take longer than the headers."""
    server = start(header_timeout_s=0.2)
    raw = wire.connect(server)
    body = b'{"model":"base","prompt":"a","max_tokens":3}'
    request = wire.request("/v1/completions", body, JSON)
    raw.sendall(request[:-5])
    time.sleep(0.4)
    raw.sendall(request[-5:])
    assert wire.status(wire.read_until(raw, b"usage")) == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters"])
@pytest.mark.parametrize("framing", ["content-length: 100000", "transfer-encoding: chunked"])
def test_bodies_that_never_end(start: Start, path: str, framing: str) -> None:
    server = start(body_timeout_s=0.2)
    media = "multipart/form-data; boundary=b" if path == "/v1/adapters" else "application/json"
    raw = wire.connect(server)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media}\r\n{framing}\r\n\r\n"
    raw.sendall(head.encode() + (b"-" if "length" in framing else b"1\r\n-\r\n"))
    answer = wire.read_until(raw, b"}}")
    assert wire.status(answer) == 408 and wire.error(answer)["code"] == "request_timeout"
    assert b"connection: close" in answer.lower() and wire.read_all(raw) == b""
    assert eventually(lambda: not server.front.reserved)
    assert all(writer.state == "aborted" for writer in server.front.adapters.writers)


def test_dripped_bodies_do_not_reset_the_clock(start: Start) -> None:
    server = start(body_timeout_s=0.3)
    raw = wire.connect(server)
    raw.sendall(wire.request("/v1/completions", b"x" * 10_000, JSON)[:-10_000])
    cut = False
    for _ in range(10_000):
        try:
            raw.sendall(b" ")
        except OSError:
            cut = True
            break
        time.sleep(0.02)
    assert cut


def test_a_large_body_has_its_time_for_every_stride(start: Start) -> None:
    """What comes steadily may take longer in all than the timeout."""
    server = start(body_timeout_s=0.4)
    raw = wire.connect(server)
    body = body_of(4 * STRIDE)
    request = wire.request("/v1/completions", body, JSON)
    raw.sendall(request[: -len(body)])
    for at in range(0, len(body), STRIDE):
        time.sleep(0.2)
        raw.sendall(body[at : at + STRIDE])
    assert wire.status(wire.read_until(raw, b"usage")) == 200


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
TRAILED = b"2c\r\n" + b'{"model":"base","prompt":"a","max_tokens":3}' + b"\r\n0\r\n"


def test_trailers_change_nothing(start: Start, tmp_path: Path) -> None:
    """They come after the key was looked at, so they must not become headers."""
    key = grant(tmp_path / "keys.json", "acme")
    server = start(data_dir=tmp_path)
    for header, status in ((f"authorization: Bearer {key}", 200), ("x: y", 401)):
        raw = wire.connect(server)
        raw.sendall(CHUNKED + JSON.encode() + b"\r\n" + header.encode() + b"\r\n\r\n" + TRAILED)
        raw.sendall(f"authorization: Bearer {key}\r\ncontent-type: text/plain\r\n\r\n".encode())
        assert wire.status(wire.read_until(raw, b"}}")) == status


@pytest.mark.parametrize("endless", [b"y" * 60_000, b"x: y\r\n" * 10_000], ids=["one", "many"])
def test_endless_trailers(start: Start, endless: bytes) -> None:
    """httptools keeps them for as long as they come: a gigabyte of memory for a gigabyte sent."""
    server = start()
    raw = wire.connect(server)
    raw.sendall(CHUNKED + JSON.encode() + b"\r\n\r\n" + TRAILED + b"x: ")
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 64 << 20:
            sent += raw.send(endless)
    assert sent < 64 << 20
    assert server.complete(max_tokens=1).status_code == 200


def idle(server: Running) -> socket.socket:
    """A connection that has had an answer, and waits."""
    raw = wire.connect(server)
    raw.sendall(wire.request("/version", b"", method="GET"))
    wire.read_until(raw, b"}")
    return raw


def test_one_connection_too_many_takes_the_place_of_an_idle_one(start: Start) -> None:
    server = start(max_connections=4)
    first = wire.connect(server)
    others = [idle(server) for _ in range(3)]
    newest = idle(server)
    assert wire.read_all(first) == b"", "the oldest gave way"
    for raw in (*others, newest):
        raw.sendall(wire.request("/version", b"", method="GET"))
        assert wire.status(wire.read_until(raw, b"}")) == 200


def test_when_all_connections_are_busy(start: Start) -> None:
    server = start(max_connections=2)
    held = threading.Event()

    async def hold(_: Any) -> Any:
        while not held.is_set():
            await asyncio.sleep(0.01)
            yield [5]

    server.front.script = hold
    body = {"model": "base", "prompt": "a", "stream": True, "max_tokens": 100}
    busy = [wire.post(server, "/v1/completions", **body) for _ in range(2)]
    begun = [wire.read_until(raw, b"data: ") for raw in busy]
    answer = wire.read_all(wire.connect(server))
    assert wire.status(answer) == 503 and wire.error(answer)["code"] == "overloaded"
    held.set()
    for raw, beginning in zip(busy, begun, strict=True):
        assert wire.events(beginning + wire.read_until(raw, b"\r\n0\r\n\r\n"))[-1] is None


def test_every_answer_guards_itself(shared: Running) -> None:
    def guards(headers: Any) -> None:
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert headers["content-security-policy"] == "frame-ancestors 'none'"

    for path in ("/version", "/metrics", "/nothing", "/v1/models", "/openapi.json", "/health"):
        guards(shared.http.get(path).headers)
    guards(shared.complete(max_tokens=1).headers)
    guards(shared.complete(max_tokens=1, stream=True).headers)
    guards(shared.complete(max_tokens=-1).headers)
    raw = wire.connect(shared)
    raw.sendall(b"GET\r\n\r\n")
    head = wire.read_all(raw).split(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    guards(dict(line.split(": ") for line in head))


def test_a_client_that_leaves_in_the_middle_of_its_body(shared: Running) -> None:
    num = len(shared.front.specs)
    for path in ("/v1/completions", "/v1/adapters"):
        raw = wire.connect(shared)
        media = "application/json" if "compl" in path else "multipart/form-data; boundary=b"
        raw.sendall(wire.request(path, b"x" * 100, f"content-type: {media}")[:-50])
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()
    assert eventually(lambda: shared.http.get("/health").status_code == 200)
    assert len(shared.front.specs) == num


def test_parse_json_keeps_what_is_json() -> None:
    assert parse_json(b'{"a": [1, 2.5, {"b": null}], "c": "\\ud83d\\ude00"}') == {
        "a": [1, 2.5, {"b": None}],
        "c": "😀",
    }
