"""A server that is killed again and again while a client pushes: the push arrives all the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.doubles import write_adapter_files
from tests.front.uploading import blobs as stored
from tests.http.test_blobs import sha

from loramux.adapters.blobs import BlobStore
from loramux_client import Adapter, Client, _sending

SERVER = """
import sys
from pathlib import Path
import uvicorn
from tests.front.house import ENGINE, INGEST, configure
from loramux.front.front import Front
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config

config = configure(Path(sys.argv[1]), port=int(sys.argv[2]))
front = Front(config, engine=ENGINE, ingest=INGEST)
uvicorn.Server(uvicorn_config(build_app(front, config), config, port=config.port)).run()
"""


@pytest.fixture
def short_dir() -> Iterator[str]:
    """For sockets, whose names must be short, and which a killed server leaves behind."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_push_to_a_server_that_is_killed(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_dir: str
) -> None:
    """Takes some ten seconds a seed: five starts of a server."""
    monkeypatch.setattr(_sending, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(_sending, "PART_BYTES", 1_500_000)
    monkeypatch.setattr(_sending, "MAX_STALLS", 30)
    draw = random.Random(seed)
    weights = draw.randbytes(40_000_000)
    folder = write_adapter_files(tmp_path / "adapter", weights)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = textwrap.dedent(SERVER)
    command = [sys.executable, "-c", script, str(tmp_path), str(port)]
    environment = {"PYTHONPATH": ":".join(sys.path), "TMPDIR": short_dir}
    pushed: list[Adapter] = []

    def push() -> None:
        with Client(f"http://127.0.0.1:{port}", max_retries=30) as client:
            pushed.append(client.adapters.push(folder, "cat"))

    thread = threading.Thread(target=push)
    thread.start()
    for kill in [True, True, True, True, False]:
        server = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            if kill:
                while thread.is_alive() and not (tmp_path / "data" / "uploads").exists():
                    time.sleep(0.01)
                time.sleep(draw.uniform(0.5, 2.0))
                continue
            thread.join(120)
            assert pushed and pushed[0].status == "ready"
        finally:
            if not kill:
                server.terminate()
                server.wait(30)
            # The scripted processes, too: unlike the real ones they outlive their front.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)
    thread.join(5)
    assert sha(weights) in stored(tmp_path) and len(stored(tmp_path)) == 2
    store = BlobStore(tmp_path / "data")
    assert all(store.verify(digest) for digest in store.digests())
    # An upload whose id was lost on the way to the client stays until it expires: one a kill.
    assert len(list((tmp_path / "data" / "uploads").iterdir())) <= 4
