"""SIGTERM to the server, over scripted processes: see front/fake_engine for the scripts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.server import free_port
from tests.front.house import PROMPT
from tests.http import wire
from tests.http.fake_front import eventually
from tests.http.test_adapters import CONF, END, NAME, part

CHILD = """
import functools, json, pkgutil, sys
from pathlib import Path
from tests.front.house import ENGINE, INGEST, configure
from loramux.front.front import Front
from loramux.http import serve

SLEEPS = (sys.executable, "-c", "import time; time.sleep(100)")
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
if broken := settings.pop("broken", None):
    owner, _, method = broken.rpartition(".")
    setattr(pkgutil.resolve_name(owner), method, lambda *_: 1 / 0)
engine = SLEEPS if settings.pop("never_ready", False) else ENGINE
serve.Front = functools.partial(Front, engine=engine, ingest=INGEST)
sys.exit(serve.serve(configure(folder, **settings)))
"""
STREAMS = 50
"""So that fifty streams of thirty tokens take more than a second."""


@dataclass
class Served:
    """The server, its port as ``wire`` wants it, and what it says of itself."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx.Client

    def ask(self, script: str, *, stream: bool = True, max_tokens: int = 30) -> Any:
        """A request that is on its way."""
        body = {"model": "base", "prompt": PROMPT, "max_tokens": max_tokens, "stream": stream}
        return wire.post(self, "/v1/completions", cache_salt=script, **body)  # type: ignore[arg-type]

    def ready(self) -> bool:
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def unfinished(self) -> int:
        found: int = self.http.get("/admin/state").json()["totals"]["unfinished"]
        return found

    def drains(self) -> bool:
        answer = self.http.get("/health/ready")
        return answer.status_code == 503 and answer.json()["reasons"] == ["draining"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(**config)``: a server in a process of its own; again: on the same folder."""
    made: list[Served] = []

    def serve(*, wait: bool = True, **settings: Any) -> Served:
        port = free_port()
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path),
            json.dumps({"port": port} | settings),
        ]
        with tempfile.TemporaryDirectory(prefix="k") as short:
            environment = {"PYTHONPATH": ":".join(sys.path), "TMPDIR": str(Path(short).parent)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        made.append(Served(process, port, http))
        assert not wait or eventually(made[-1].ready, within_s=60)
        return made[-1]

    yield serve
    for each in made:
        each.http.close()
        each.process.kill()
        each.process.wait()


def test_fifty_streams_finish_while_the_listener_stays(serve: Any, tmp_path: Path) -> None:
    server, gate = serve(drain_s=60), tmp_path / "gate"
    raws = [server.ask(f"gate={gate}") for _ in range(STREAMS)]
    assert eventually(lambda: server.unfinished() == STREAMS, within_s=30)
    server.process.send_signal(signal.SIGTERM)
    assert eventually(server.drains)
    for path, body in (("/v1/completions", {"model": "base"}), ("/v1/adapters", {})):
        refused = server.http.post(path, json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["connection"] == "close" and refused.headers["retry-after"]
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/v1/models").status_code == 200
    gate.touch()
    for raw in raws:
        found = wire.events(wire.read_until(raw, b"0\r\n\r\n"))
        assert found[-1] is None and found[-2]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("how", ["time is up", "told twice"])
def test_who_does_not_finish_is_told(serve: Any, how: str) -> None:
    server = serve(drain_s=0.3 if how == "time is up" else 1000)
    streams = [server.ask("hang") for _ in range(STREAMS)]
    whole = server.ask("hang", stream=False)
    assert eventually(lambda: server.unfinished() == STREAMS + 1, within_s=30)
    server.process.send_signal(signal.SIGTERM)
    if how == "told twice":
        assert eventually(server.drains)
        server.process.send_signal(signal.SIGINT)
    for raw in (*streams, whole):  # not a word was said in any of them
        answer = wire.read_all(raw)
        assert wire.status(answer) == 503 and wire.error(answer)["code"] == "draining"
        assert b"retry-after: 1" in answer
    assert server.process.wait(30) == (0 if how == "time is up" else 128 + signal.SIGINT)


def test_an_upload_on_its_way_arrives(serve: Any, tmp_path: Path) -> None:
    server = serve(drain_s=60)
    body = NAME + CONF + part("weights", b"w" * 1000) + END
    request = wire.request(
        "/v1/adapters?wait=30", body, "content-type: multipart/form-data; boundary=B"
    )
    raw = wire.connect(server)
    raw.sendall(request[:-500])
    assert eventually(lambda: any((tmp_path / "data" / "blobs" / "tmp").iterdir())), "it has begun"
    server.process.send_signal(signal.SIGTERM)
    assert eventually(server.drains)
    for _ in range(200):
        assert server.drains(), "it waits for the upload, and its listener stays"
    raw.sendall(request[-500:])
    assert wire.status(wire.read_until(raw, b"}")) in (200, 201)
    assert server.process.wait(30) == 0
    again = serve()
    assert [card["id"] for card in again.http.get("/v1/models").json()["data"]] == ["base", "new"]


def test_an_adapter_in_validation_is_validated_by_the_next_server(serve: Any) -> None:
    server = serve(drain_s=60)
    files = {"config": b'{"wait": 1.5}', "weights": b"w"}
    answer = server.http.post("/v1/adapters", data={"name": "cat"}, files=files)
    assert answer.status_code == 202 and answer.json()["status"] == "validating"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    again = serve()
    show = lambda: again.http.get("/v1/adapters/cat").json()["status"]  # noqa: E731
    assert eventually(lambda: show() == "ready", within_s=30)


def test_a_server_that_is_still_starting_ends_at_once(serve: Any) -> None:
    server = serve(wait=False, never_ready=True, drain_s=1000)
    reached = lambda: server.http.get("/health/ready").json()["reasons"]  # noqa: E731

    def starting() -> bool:
        try:
            return bool(reached() == ["engine_starting"])
        except httpx.TransportError:
            return False

    assert eventually(starting, within_s=60)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    ("broken", "script"),
    [
        ("loramux.front.engine_client:EngineClient.died", "die=3"),
        ("loramux.front.recovery:Recovery._run_apart", "die=3"),
        ("loramux.front.ledger:Ledger.expire", "hang"),
    ],
)
def test_a_server_whose_books_are_broken_ends_and_says_so(
    serve: Any, broken: str, script: str
) -> None:
    """Else requests would wait for ever, behind a front that seems to live."""
    server = serve(wait=False, broken=broken)
    if "expire" not in broken:
        assert eventually(server.ready, within_s=60)
        answer = wire.read_all(server.ask(script))
        assert b'"code":"draining"' in answer and b"[DONE]" not in answer
    assert server.process.wait(30) == 70
