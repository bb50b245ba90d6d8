"""Blends that outlive things: their sources, the server, their client, the ingest process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters.peft_files import make_config, make_tensors, safetensors_bytes
from tests.front.house import INGEST
from tests.front.uploading import blobs as stored
from tests.http.blending import BASE, blend, rows, server_with, upload
from tests.http.fake_front import eventually
from tests.http.granting import client, grant
from tests.http.test_bad_inputs import refusal

from loramux.adapters.blobs import BlobStore


def test_a_blend_outlives_its_sources_and_the_server(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        for seed, name in enumerate(("one", "two")):
            upload(server, name, seed=seed)
        made = blend(server, "mix", "one", "two").json()
        for name in ("one", "two"):
            server.http.delete(f"/v1/adapters/{name}")
        assert eventually(lambda: len(stored(tmp_path)) == 2)
        assert server.complete(model="mix").status_code == 200
    for path in (tmp_path / "data" / "packed").glob("*"):
        path.unlink()  # it is packed again, and what it was made of is still known
    with server_with(tmp_path) as server:
        view = server.http.get("/v1/adapters/mix").json()
        assert view["status"] == "ready" and view["report"] == made["report"]
        assert server.complete(model="mix").status_code == 200


def test_a_source_deleted_meanwhile_is_read_to_the_end(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        for seed, name in enumerate(("one", "two")):
            upload(server, name, seed=seed)
        ingest: Any = server.front._ingest  # type: ignore[attr-defined]
        ask = ingest.blend

        async def later(*args: Any, **fields: Any) -> Any:
            await server.front.adapters.delete("one")
            while rows(server, "one"):
                await server.front.adapters.background.on_disk(lambda: None)
            return await ask(*args, **fields)

        ingest.blend = later
        assert blend(server, "mix", "one", "two").status_code == 201
        assert eventually(lambda: len(stored(tmp_path)) == 4), "two's and mix's"


def test_a_blob_collected_at_the_worst_moment_is_made_again(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        upload(server, "one")
        ingest: Any = server.front._ingest  # type: ignore[attr-defined]
        ask, asked = ingest.blend, []

        async def unlucky(*args: Any, **fields: Any) -> Any:
            done = await ask(*args, **fields)
            asked.append(done.digest)
            if len(asked) == 1:
                assert BlobStore(tmp_path / "data").delete(done.digest)
            return done

        ingest.blend = unlucky
        assert blend(server, "mix", "one").status_code == 201
        assert len(asked) == 2 and asked[0] == asked[1]


def test_two_tenants_blend_only_what_they_see(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    alice, bob = (grant(keys, tenant) for tenant in ("alice", "bob"))
    with server_with(tmp_path, api_keys=keys) as server:
        mine, theirs = client(server, alice), client(server, bob)
        assert upload(mine, "one", seed=1).status_code == 201
        assert upload(mine, "secret", seed=2).status_code == 201
        assert upload(theirs, "one", seed=3).status_code == 201
        assert refusal(blend(theirs, "mix", "one", "secret"), 404)["param"] == "blend.sources[1].id"
        digest = mine.http.get("/v1/adapters/secret").json()["digest"]
        stolen = blend(theirs, "mix", "one", f"secret@sha256:{digest}")
        assert refusal(stolen, 404) | {"message": ""} == refusal(
            blend(theirs, "mix", "one", f"nothing@sha256:{digest}"), 404
        ) | {"message": ""}
        one, other = blend(mine, "mix", "one").json(), blend(theirs, "mix", "one").json()
        assert one["digest"] != other["digest"]
        assert one["report"]["blend"]["sources"][0]["id"] == "one@1"
        infer = client(server, grant(keys, "bob", "infer"))
        server.front.keys._checked_at = float("-inf")
        assert refusal(blend(infer, "mix", "one"), 403)["code"] == "insufficient_scope"


def test_a_client_that_leaves_finds_its_blend_later(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        upload(server, "one")
        pid = ingest_pid(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url) as impatient:
            body = {"name": "mix", "blend": {"method": "soup", "sources": [{"id": "one"}]}}
            impatient.post("/v1/adapters", json=body, timeout=httpx.Timeout(10, read=0.3))
        os.kill(pid, signal.SIGCONT)
        url = f"{server.url}/v1/adapters/mix"
        assert eventually(lambda: httpx.get(url).json().get("status") == "ready", within_s=20)


def ingest_pid(folder: Path) -> int:
    """Of the ingest process that works in this folder."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--data-dir\0{folder}/" in (text := command.read_text()) and "ingest" in text:
                return int(command.parent.name)
    raise AssertionError("there is none")


def test_an_ingest_process_killed_meanwhile_is_replaced(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        upload(server, "one")
        pid = ingest_pid(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(blend(server, "mix", "one")))
        thread.start()
        assert eventually(lambda: server.front._ingest._sent)  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        thread.join(30)
        assert answers[0].status_code == 201


def test_a_blend_that_kills_the_ingest_process_is_refused(tmp_path: Path) -> None:
    """The scripted one knows no blends: it dies of each."""
    with server_with(tmp_path, ingest=INGEST) as server:
        files = {"config": b"{}", "weights": b"x"}
        server.http.post("/v1/adapters?wait=30", data={"name": "one"}, files=files)
        error = refusal(blend(server, "mix", "one"), 422)
        assert "the ingest process ended" in error["message"]
        answer = server.http.post("/v1/adapters?wait=30", data={"name": "two"}, files=files)
        assert answer.status_code == 201


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
import uvicorn
from tests.front.house import ENGINE, configure
from loramux.front.front import Front
from loramux.front.adapters import AdapterService
from loramux.http.app import build_app
from loramux.http.connection import uvicorn_config

create = AdapterService.create

async def killed(self, name, *args, **fields):
    if fields.get("blend"):
        os.kill(os.getpid(), signal.SIGKILL)
    return await create(self, name, *args, **fields)

AdapterService.create = killed
config = configure(Path(sys.argv[1]), port=int(sys.argv[2]))
uvicorn.Server(uvicorn_config(build_app(Front(config, engine=ENGINE), config), config,
                              port=config.port)).run()
"""


def test_a_server_killed_between_the_blend_and_its_registration(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="k") as short:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(port)],
            env={"PYTHONPATH": ":".join(sys.path), "TMPDIR": short},
            start_new_session=True,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                await_ready(http)
                weights = safetensors_bytes(make_tensors(BASE))
                files = {"config": json.dumps(make_config()).encode(), "weights": weights}
                answer = http.post("/v1/adapters?wait=30", data={"name": "one"}, files=files)
                assert answer.status_code == 201
                before = stored(tmp_path)
                body = {"name": "mix", "blend": {"method": "soup", "sources": [{"id": "one"}]}}
                with pytest.raises(httpx.TransportError):
                    http.post("/v1/adapters", json=body)
            assert process.wait(30) == -signal.SIGKILL
            assert len(stored(tmp_path)) == 3, "the blend's weights are there, and nobody's"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    with server_with(tmp_path) as server:
        assert eventually(lambda: stored(tmp_path) == before)
        assert [a["name"] for a in server.http.get("/v1/adapters").json()["data"]] == ["one"]
        assert blend(server, "mix", "one").status_code == 201


def await_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/health").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("not ready")
