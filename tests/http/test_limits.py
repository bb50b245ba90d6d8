"""Bodies, headers and patience have bounds, and a refusal arrives."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually

from loramux.http.connection import MAX_HEAD_BYTES, MAX_HEADERS
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
