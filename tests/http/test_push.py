"""The client against the real front, over a line that is cut again and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.client.doubles import Both, write_adapter_files
from tests.http.conftest import Running
from tests.http.test_blobs import real_server, sha

from loramux_client import _client, _sending

WEIGHTS = bytes(range(256)) * 16_000


class BadLine:
    """A TCP proxy that drops a connection after so many bytes from the client, for each of
    ``cuts`` in turn; connections after those are left alone. Counts what it forwards."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self.port, self.cuts, self.forwarded = port, cuts, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                left = self.cuts.pop(0) if self.cuts else 1 << 60
                for ends in ((client, server, left), (server, client, 1 << 60)):
                    threading.Thread(target=self.copy, args=ends, daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while left and (data := source.recv(min(left, 1 << 16))):
                sink.sendall(data)
                left -= len(data)
                self.forwarded += len(data) if sink.getpeername()[1] == self.port else 0
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with real_server(tmp_path_factory.mktemp("push")) as server:
        yield server


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_push_over_a_line_that_breaks(
    real: Running, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))

    monkeypatch.setattr(
        _client, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)))
    )
    monkeypatch.setattr(_client, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(_sending, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(_sending, "PART_BYTES", 1_000_000)
    monkeypatch.setattr(_sending, "MAX_STALLS", 1000)  # busy until the server sees the cut
    weights = kind.encode() + WEIGHTS
    folder = write_adapter_files(tmp_path / "a", weights)
    cuts = [1_234_567, 300, 500_000, 1_100_000, 90, 2_000_000]
    line = BadLine(real.port, cuts)
    seen: list[tuple[int, int]] = []
    with contextlib.closing(line.listener), contextlib.closing(Both(kind, line.url)) as client:  # type: ignore[arg-type]
        got = client.call("adapters.push", folder, kind, progress=lambda *c: seen.append(c))
        assert got.status == "ready" and not cuts
        total = len(weights) + len(json.dumps({"r": 4}))
        assert seen[-1] == (total, total)
        assert real.http.head(f"/v1/blobs/sha256:{sha(weights)}").status_code == 200
        assert line.forwarded < 2 * total, "what had arrived was not sent again"
        before = line.forwarded
        client.call("adapters.push", folder, f"{kind}-again")
        assert line.forwarded - before < 10_000, "the second push sends no file"
