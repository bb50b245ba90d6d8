"""Both clients over a real socket: what only a connection can show."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.client.doubles import Both, write_adapter_files

from loramux_client import (
    ConnectionFailedError,
    IncompleteResponseError,
    PayloadTooLargeError,
    RequestTimeoutError,
)

CHUNK = b'data: {"id": "c", "choices": [{"index": 0, "text": "x"}]}\n\n'


class Server(ThreadingHTTPServer):
    """``model`` in the body picks what happens. Counts connections and bytes received."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.connections = 0
        self.received = 0
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        fields = json.loads(self.rfile.read(length))
        if self.path == "/v1/adapters":
            self._json(201, {"name": "a", "status": "ready"})
        else:
            getattr(self, fields["model"])()

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("content-length", "99")  # of the body that a GET would have
        self.end_headers()

    def do_PUT(self) -> None:
        length = int(self.headers["content-length"])
        # Half of a large body is enough to say no.
        too_large = length > 16 << 20
        left = length // 2 if too_large else length
        while left and (block := self.rfile.read(min(left, 1 << 16))):
            self.server.received += len(block)
            left -= len(block)
        if too_large:
            error = {"message": "too large", "code": "payload_too_large"}
            self._json(413, {"error": error})
            # As servers do: closing on unread bytes would reset the connection, answer and all.
            self.rfile.read(length - length // 2)
        else:
            self._json(201, {})

    def _json(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def whole(self) -> None:
        self._begin()
        self._chunk(CHUNK)
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def endless(self) -> None:
        self._begin()
        try:
            while True:
                self._chunk(CHUNK)
                time.sleep(0.01)
        except OSError:
            self.server.client_left.set()
            self.close_connection = True

    def cut(self) -> None:
        self._begin()
        self._chunk(CHUNK)
        self.close_connection = True

    def truncated(self) -> None:
        self._begin()
        self._chunk(CHUNK)
        self._chunk(b"")

    def hang(self) -> None:
        self.server.client_left.wait(5)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.client_left.set()
        server.shutdown()
        thread.join()


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Both]:
    with contextlib.closing(Both(request.param, server.url)) as both:
        yield both


def test_streams_read_to_their_end_share_a_connection(client: Both, server: Server) -> None:
    for _ in range(3):
        assert [chunk.text for chunk in client.chunks("p", model="whole")] == ["x"]
    assert server.connections == 1


def test_leaving_a_stream_tells_the_server(client: Both, server: Server) -> None:
    stream = client.open("p", model="endless")
    assert stream.next().text == "x"
    assert not server.client_left.is_set()
    stream.close()
    assert server.client_left.wait(5)


@pytest.mark.parametrize("model", ["cut", "truncated"])
def test_a_connection_that_ends_early_or_cleanly_but_too_soon(client: Both, model: str) -> None:
    stream = client.open("p", model=model)
    assert stream.next().text == "x"
    with pytest.raises(IncompleteResponseError):
        stream.next()


def test_a_large_push_does_not_fill_memory(client: Both, server: Server, tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "a", b"")
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(15 << 20)
    tracemalloc.start()
    assert client.call("adapters.push", folder).status == "ready"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert server.received > 15 << 20 and peak < 4 << 20


def test_a_push_refused_half_way_says_why(client: Both, tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "a", bytes(24 << 20))
    with pytest.raises(PayloadTooLargeError):
        client.call("adapters.push", folder)


def test_nobody_there_and_nobody_answering(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for kind in ("sync", "async"):
            with contextlib.closing(Both(kind, url, max_retries=0)) as both:
                with pytest.raises(ConnectionFailedError):
                    both.call("models")
            with contextlib.closing(Both(kind, server.url, timeout=0.1)) as both:
                with pytest.raises(RequestTimeoutError):
                    both.call("complete", "p", model="hang")
