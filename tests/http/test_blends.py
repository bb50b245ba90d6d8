"""Blends over HTTP: the real front and ingest process, an engine that is scripted."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.adapters.blending import FILES, deltas, differ
from tests.adapters.peft_files import Tensors, make_config, make_tensors, safetensors_bytes
from tests.front.house import ENGINE, INGEST, SERVER, configure
from tests.front.uploading import blobs as stored
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.granting import client, grant
from tests.http.test_bad_inputs import refusal

from loramux.adapters.blobs import BlobStore
from loramux.cli import main
from loramux.front.front import INGEST as REAL_INGEST
from loramux.front.front import Front
from loramux.wire import MODULES, BaseDescription
from loramux_client import AdapterInvalidError, Client, NotFoundError

BASE = BaseDescription(
    fingerprint="fake-base",
    num_layers=1,
    widths={module: (16, 16) for module in MODULES},
    slice_bytes=4096,
    max_rank=64,
)
"""What the scripted engine says its base is."""


@contextmanager
def server_with(folder: Path, ingest: Any = REAL_INGEST, **fields: Any) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(folder, port=0, **fields)
        server, stop = serve(Front(config, engine=ENGINE, ingest=ingest), config)
        try:
            assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
            yield server
        finally:
            stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blends")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with server_with(folder) as server:
        for seed, name in enumerate(("one", "two", "three")):
            assert upload(server, name, seed=seed).status_code == 201
        yield server


def upload(server: Running, name: str, query: str = "", **make: Any) -> httpx.Response:
    weights = safetensors_bytes(make_tensors(BASE, **make))
    files = {"config": json.dumps(make_config()).encode(), "weights": weights}
    url = f"/v1/adapters?wait=30{query}"
    return server.http.post(url, data={"name": name}, files=files)


def blend(
    server: Running, name: str, *sources: Any, query: str = "?wait=30", **fields: Any
) -> httpx.Response:
    """``fields`` are the recipe's, ``method`` soup if not given."""
    body: dict[str, Any] = {"name": name}
    if "expected_generation" in fields:
        body["expected_generation"] = fields.pop("expected_generation")
    listed = [{"id": s} if isinstance(s, str) else {"id": s[0], "weight": s[1]} for s in sources]
    body["blend"] = {"method": "soup", "sources": listed, **fields}
    return server.http.post("/v1/adapters" + query, json=body)


def rows(server: Running, name: str) -> list[Any]:
    return [row for row in server.front.adapters._catalog.rows() if row.name == name]  # type: ignore[attr-defined]


def files_of(server: Running, name: str, data: Path, into: Path) -> Path:
    """The newest files of a name as a folder."""
    into.mkdir(exist_ok=True)
    row = rows(server, name)[0]
    for file, digest in zip(FILES, (row.config_digest, row.weights_digest), strict=True):
        (into / file).write_bytes(BlobStore(data / "data").path(digest).read_bytes())
    return into


def changes(tensors: Tensors, factor: float = 2.0) -> dict[tuple[int, str], Any]:
    """What ``make_tensors`` and ``make_config`` change: alpha / r is 2."""
    names = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    return {
        (0, m): factor
        * (tensors[names.format(m, "B")].astype(np.float64) @ tensors[names.format(m, "A")])
        for m in ("q_proj", "v_proj")
    }


def test_the_life_of_a_blend(real: Running, folder: Path, tmp_path: Path) -> None:
    answer = blend(real, "mix", ("one", 0.5), ("two@1", -2))
    assert answer.status_code == 201, answer.text
    view = answer.json()
    assert (view["status"], view["rank"], view["generation"]) == ("ready", 8, 1)
    digests = {name: rows(real, name)[0].digest for name in ("one", "two")}
    assert view["report"]["blend"] == {
        "method": "soup",
        "sources": [
            {"id": "one@1", "digest": digests["one"], "weight": 0.5},
            {"id": "two@1", "digest": digests["two"], "weight": -2.0},
        ],
    }
    assert real.http.get("/v1/adapters/mix").json()["report"] == view["report"]
    one, two = (changes(make_tensors(BASE, seed=seed)) for seed in (0, 1))
    got = deltas(files_of(real, "mix", folder, tmp_path / "mix"), BASE)
    assert differ(got, {at: 0.5 * one[at] - 2 * two[at] for at in one}) < 1e-6
    assert real.complete(model="mix").headers["x-loramux-adapter"] == view["digest"]
    # The same again is the same adapter, other weights are others.
    again = blend(real, "mix", (f"one@sha256:{digests['one'][:12]}", 0.5), ("two", -2.0))
    assert again.status_code == 200 and again.json()["digest"] == view["digest"]
    other = blend(real, "mix", ("one", 0.5), ("two", 2))
    assert refusal(other, 409)["code"] == "generation_conflict"
    other = blend(real, "mix", ("one", 0.5), ("two", 2), expected_generation=1)
    assert other.status_code == 201 and other.json()["generation"] == 2


def test_uniform_weights_are_the_default(real: Running, folder: Path, tmp_path: Path) -> None:
    view = blend(real, "even", "one", "two", "three").json()
    assert [s["weight"] for s in view["report"]["blend"]["sources"]] == [1 / 3] * 3
    parts = [changes(make_tensors(BASE, seed=seed)) for seed in range(3)]
    got = deltas(files_of(real, "even", folder, tmp_path / "even"), BASE)
    assert differ(got, {at: sum(part[at] for part in parts) / 3 for at in got}) < 1e-6


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "ties", "rank": 3, "density": 0.5, "majority_sign_method": "frequency"},
        {"method": "dare_ties", "rank": 3, "density": 0.5, "seed": 4},
        {"method": "dare_linear", "rank": 3, "density": 0.5},
    ],
)
def test_methods_and_what_they_report(real: Running, recipe: dict[str, Any]) -> None:
    name = recipe["method"]
    view = blend(real, name, "one", ("two", 0.5), **recipe).json()
    said = view["report"]["blend"]
    assert view["rank"] == 3 and recipe.items() <= said.items()
    assert 0 < said["worst"]["kept"] <= said["kept"] < 1
    assert said["worst"]["module"] in ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj")
    assert [source["weight"] for source in said["sources"]] == [1, 0.5]
    assert blend(real, name, "one", ("two", 0.5), **recipe).status_code == 200


def test_one_source_scaled_or_compressed(real: Running) -> None:
    scaled = blend(real, "lines", "one", method="scale_layers", alpha=0.5, beta=1).json()
    assert scaled["report"]["blend"]["alpha"] == 0.5 and "kept" not in scaled["report"]["blend"]
    small = blend(real, "small", "mix", method="compress", rank=2).json()
    assert small["rank"] == 2 and small["report"]["blend"]["kept"] < 1
    whole = blend(real, "whole", "one", method="compress", rank=4).json()
    assert whole["report"]["blend"]["kept"] == 1


def test_looking_only_leaves_nothing(real: Running, folder: Path) -> None:
    before = stored(folder)
    view = blend(real, "dry", "one", ("three", 1), "two", query="?validate_only=1")
    assert refusal(view, 400)["param"] == "blend.sources", "weights for some"
    answer = blend(real, "dry", "one", "three", query="?validate_only=1")
    assert answer.status_code == 200 and answer.json()["generation"] == 0
    assert answer.json()["report"]["blend"]["method"] == "soup"
    assert real.http.get("/v1/adapters/dry").status_code == 404
    assert eventually(lambda: stored(folder) == before)


def test_sources_that_cannot_be_used(real: Running) -> None:
    files = {"config": b"{}", "weights": b"x"}
    failed = real.http.post("/v1/adapters?wait=30", data={"name": "bad"}, files=files)
    assert failed.status_code == 422
    for source, status, code in [
        ("nobody", 404, "model_not_found"),
        ("one@7", 404, "model_not_found"),
        ("one@sha256:" + "0" * 64, 404, "model_not_found"),
        ("bad", 409, "adapter_failed"),
        ("base", 400, "invalid_request"),
        ("../one", 404, "model_not_found"),
        ("", 404, "model_not_found"),
    ]:
        error = refusal(blend(real, "no", "two", source), status)
        assert (error["code"], error["param"]) == (code, "blend.sources[1].id"), source
    assert real.http.get("/v1/adapters/no").status_code == 404


def test_more_than_pairs(real: Running, folder: Path) -> None:
    tensors = make_tensors(BASE)
    for name in [name for name in tensors if ".lora_B." in name]:
        tensors[name.replace("weight", "bias")] = tensors[name][:, 0].copy()
    files = {
        "config": json.dumps(make_config(lora_bias=True)).encode(),
        "weights": safetensors_bytes(tensors),
    }
    answer = real.http.post("/v1/adapters?wait=30", data={"name": "biased"}, files=files)
    assert answer.status_code == 201
    before = stored(folder)
    error = refusal(blend(real, "no", "one", "biased"), 422)
    assert error["code"] == "adapter_invalid" and error["problems"][0].startswith("biased@1 ")
    many = refusal(blend(real, "no", *["one"] * 17), 422)
    assert many["code"] == "rank_too_large" and "rank 68" in many["message"]
    assert "up to 64" in many["message"] and "rank" in many["message"]
    assert blend(real, "yes", *["one"] * 17, rank=4).json()["rank"] == 4
    assert refusal(blend(real, "base", "one"), 409)["code"] == "name_reserved"
    real.http.delete("/v1/adapters/yes")
    assert eventually(lambda: stored(folder) == before)


def request(**changes: Any) -> dict[str, Any]:
    """Of a TIES blend that is right but for ``changes``; None leaves a field out."""
    good = {"method": "ties", "sources": [{"id": "one"}], "rank": 2, "density": 0.5}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


MALFORMED: list[tuple[Any, str]] = [
    ("soup", "blend"),
    (request(method=None), "blend.method"),
    (request(method="average"), "blend.method"),
    (request(method=["soup"]), "blend.method"),
    (request(extra=1), "blend"),
    (request(seed=1), "blend"),
    (request(alpha=1), "blend"),
    (request(method="soup"), "blend"),
    (request(rank=None), "blend.rank"),
    (request(density=None), "blend.density"),
    (request(rank=0), "blend.rank"),
    (request(rank=True), "blend.rank"),
    (request(rank=2.0), "blend.rank"),
    (request(rank=10**9), "blend.rank"),
    (request(density=0), "blend.density"),
    (request(density=1.5), "blend.density"),
    (request(density="0.5"), "blend.density"),
    (request(majority_sign_method="most"), "blend.majority_sign_method"),
    (request(method="dare_ties", seed=-1), "blend.seed"),
    (request(method="dare_ties", seed=2**63), "blend.seed"),
    (request(sources=[]), "blend.sources"),
    (request(sources=None), "blend.sources"),
    (request(sources={"id": "one"}), "blend.sources"),
    (request(sources=[{"id": "one"}] * 33), "blend.sources"),
    (request(sources=["one"]), "blend.sources[0]"),
    (request(sources=[{"id": "one"}, {"weight": 1}]), "blend.sources[1]"),
    (request(sources=[{"id": "one", "scale": 1}]), "blend.sources[0]"),
    (request(sources=[{"id": 1}]), "blend.sources[0].id"),
    (request(sources=[{"id": "one", "weight": True}]), "blend.sources[0].weight"),
    (request(sources=[{"id": "one", "weight": 1e39}]), "blend.sources[0].weight"),
    (request(sources=[{"id": "one", "weight": 10**400}]), "blend.sources[0].weight"),
    ({"method": "compress", "rank": 1, "sources": [{"id": "one"}] * 2}, "blend.sources"),
    (
        {"method": "compress", "rank": 1, "sources": [{"id": "one", "weight": 1}]},
        "blend.sources[0]",
    ),
    ({"method": "compress", "sources": [{"id": "one"}]}, "blend.rank"),
    ({"method": "scale_layers", "alpha": 1, "sources": [{"id": "one"}]}, "blend.beta"),
]


@pytest.mark.parametrize(("body", "param"), MALFORMED)
def test_a_malformed_recipe_names_its_field(real: Running, body: Any, param: str) -> None:
    answer = real.http.post("/v1/adapters", json={"name": "no", "blend": body})
    assert refusal(answer)["param"] == param, answer.text


def test_files_and_a_blend_are_not_mixed(real: Running) -> None:
    body = {"name": "no", "blend": request(), "weights": "sha256:" + "0" * 64}
    assert "blend" in refusal(real.http.post("/v1/adapters", json=body))["message"]
    assert refusal(real.http.post("/v1/adapters", json={"blend": request()}))["param"] == "name"
    raw = b'{"name":"no","blend":{"method":"soup","sources":[{"id":"one","weight":%s}]}}'
    for number in (b"NaN", b"1e999", b"-1e999"):
        answer = real.http.post(
            "/v1/adapters", content=raw % number, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, number


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


def test_the_client_and_the_command(real: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(real.url) as asking:
        made = asking.adapters.blend(
            "by-client", method="dare_ties", sources=["one", ("two", 0.5)], rank=3, density=0.5
        )
        assert made.status == "ready" and made.report["blend"]["seed"] == 0
        with pytest.raises(NotFoundError) as missing:
            asking.adapters.blend("by-client", method="soup", sources=["one", "nobody"])
        assert missing.value.param == "blend.sources[1].id"
        with pytest.raises(AdapterInvalidError, match="rank 68"):
            asking.adapters.blend("by-client", method="soup", sources=["one"] * 17)
    words = "blend by-command one two=-0.5 --method ties --rank 3 --density 0.5"
    assert main(["adapters", "--url", real.url, *words.split()]) == 0
    out = capsys.readouterr().out
    assert "by-command" in out and '"weight": -0.5' in out and '"majority_sign_method"' in out
    words = "blend by-command one --method soup --expected-generation 1"
    assert main(["adapters", "--url", real.url, *words.split()]) == 0
    assert main(["adapters", "--url", real.url, *words.replace("soup", "stew").split()]) == 1
    assert "blend.method: must be one of soup, ties" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapters", "blend", "x", "one=much", "--method", "soup"])
    assert "SOURCE[=WEIGHT]" in capsys.readouterr().err
