"""A server that is killed while an alias is swapped: what was answered holds, old or new."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.front.house import PROMPT
from tests.http.fake_front import eventually
from tests.http.test_server_killed import SERVER, short_dir

__all__ = ["short_dir"]


@contextlib.contextmanager
def serving(folder: Path, port: int, short: str):  # type: ignore[no-untyped-def]
    """A server of its own process; killed in the end."""
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), str(folder), str(port)],
        env={"PYTHONPATH": ":".join(sys.path), "TMPDIR": short},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return http.get("/health").status_code == 200
            return False

        try:
            assert eventually(ready, within_s=60)
            yield http
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


@pytest.mark.slow
def test_killed_between_setting_and_answering(tmp_path: Path, short_dir: str) -> None:
    """Takes some twenty seconds: seven starts of a server."""
    draw = random.Random(7)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(tmp_path, port, short_dir) as http:
        for number in (1, 2):
            files = {"config": b"{}", "weights": b"%d" % number}
            query = {"wait": 30, "expected_generation": number - 1}
            answer = http.post("/v1/adapters", params=query, data={"name": "cat"}, files=files)
            assert answer.status_code == 201
        assert http.put("/v1/aliases/prod", json={"target": "cat@1"}).status_code == 201
    swaps = Swaps()
    for _ in range(6):
        with serving(tmp_path, port, short_dir) as http:
            swaps.check(http)
            thread = threading.Thread(target=swaps.go_on, args=(port,))
            thread.start()
            time.sleep(draw.uniform(0.05, 0.4))
            assert thread.is_alive(), "killed in the middle of it"
        thread.join(30)
    assert swaps.revision > 20


class Swaps:
    """Points an alias at one version and the other in turn, and knows what it was answered."""

    def __init__(self) -> None:
        self.revision = 1
        self.asked = False

    def check(self, http: httpx.Client) -> None:
        """The alias is what the last answer said, or what was asked for last."""
        view = http.get("/v1/aliases/prod").json()
        assert view["revision"] in (self.revision, self.revision + self.asked)
        self.revision, self.asked = view["revision"], False
        model = view["targets"][0]["model"]
        assert model == f"cat@{2 - self.revision % 2}"
        body = {"model": "prod", "prompt": PROMPT, "max_tokens": 1}
        assert http.post("/v1/completions", json=body).headers["x-loramux-model"] == model

    def go_on(self, port: int) -> None:
        """Until the server is no more."""
        url = f"http://127.0.0.1:{port}"
        with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=url) as http:
            while True:
                body = {
                    "target": f"cat@{1 + self.revision % 2}",
                    "expected_revision": self.revision,
                }
                self.asked = True
                assert http.put("/v1/aliases/prod", json=body).status_code == 200
                self.revision, self.asked = self.revision + 1, False
