"""Killed or without power at any moment of an upload, a data directory is whole: what was answered
is there, what was not is absent or can be gone on with, and nothing else has changed."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.adapters.peft_files import (
    base_description,
    make_config,
    make_tensors,
    safetensors_bytes,
)
from tests.adapters.power import Power
from tests.adapters.upload_child import CONFIG, FILES, WEIGHTS, Server, sha, upload
from tests.killing import told

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore
from loramux.adapters.registry import Registry
from loramux.errors import NotFound
from loramux.ingest.job import run
from loramux.wire import IngestJob

ROOT = Path(__file__).parents[2]
WAYS = ["multipart", "whole", "in_parts"]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A data directory with one adapter from before."""
    data_dir = tmp_path / "before"
    store, registry = BlobStore(data_dir), Registry(data_dir)
    digests = []
    for data in (b"{}", b"old weights"):
        with store.writer(100) as writer:
            writer.write(data)
            digests.append(writer.commit())
    row, _ = registry.create("old", config_digest=digests[0], weights_digest=digests[1])
    registry.mark_ready(row.id, fingerprint="base", report={})
    registry.close()
    return data_dir


def check(data_dir: Path, answered: list[str]) -> str:
    """The state of the new adapter after a restart; every answer has to hold."""
    server = Server(data_dir)
    assert not any((data_dir / "blobs" / "tmp").iterdir())
    rows = {row.name: row for row in server.registry.list()}
    assert rows["old"].status == "ready"
    for digest in server.store.digests():
        assert server.store.verify(digest), "a blob with a final name is whole"
        granted = server.blobs._granted.uses(digest)
        assert granted or server.registry.uses_blob(digest), "no orphans after a start"
    for row in rows.values():
        assert server.store.has(row.config_digest) and server.store.has(row.weights_digest)
    if "new" in rows:
        assert server.store.path(rows["new"].config_digest).read_bytes() == CONFIG
        assert server.store.path(rows["new"].weights_digest).read_bytes() == WEIGHTS
    asyncio.run(hold_true(server, answered))
    server.close()
    state = rows["new"].status if "new" in rows else "absent"
    assert state == "ready" or "ready" not in answered, "an acknowledged adapter is there"
    return state


async def hold_true(server: Server, answered: list[str]) -> None:
    """What was said of blobs and uploads is so."""
    upload_id, offset = "", 0
    for line in answered:
        kind, _, value = line.partition(" ")
        if kind == "blob":
            assert await server.blobs.size("", value) in map(len, FILES)
        if kind == "upload":
            upload_id = value
        if kind == "offset":
            offset = int(value)
    if upload_id and offset < len(WEIGHTS):
        _, found = await server.resumable.show("", upload_id)
        assert found >= offset
        path = server.data_dir / "uploads" / upload_id
        assert path.read_bytes()[:offset] == WEIGHTS[:offset]
    database = server.registry.database.connection
    for (digest,) in database.execute("SELECT digest FROM tenant_blobs").fetchall():
        assert server.store.has(digest), "nobody is granted what is not there"
    rows = database.execute("SELECT id FROM uploads").fetchall()
    files = {path.name for path in (server.data_dir / "uploads").iterdir()}
    assert files == {upload_id for (upload_id,) in rows}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "in_parts")) for way in WAYS]
)
def test_killed_at_every_point_of_an_upload(way: str, before: Path, tmp_path: Path) -> None:
    """May take over ten seconds: each of a hundred points is a process of its own, a start that
    checks what it left, and a second upload on top."""
    folder = tmp_path / "killed"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "tests.adapters.upload_child", way, str(before), str(folder)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"},
        check=True,
        timeout=120,
    )
    data_dirs = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: int(p.name))
    assert len(data_dirs) > 40
    states = [check(data_dir, told(data_dir)) for data_dir in data_dirs]
    order = ["absent", "validating", "ready"]
    assert set(states) == set(order)
    assert states == sorted(states, key=order.index), "each state is reached once and kept"
    for data_dir in data_dirs:
        upload(data_dir, way)  # the uploader tries again and gets what it wanted
        assert check(data_dir, told(data_dir)) == "ready"


@pytest.mark.parametrize("keep_names", [False, True], ids=["names lost", "names kept"])
@pytest.mark.parametrize("way", WAYS)
def test_without_power_at_every_point_of_an_upload(
    way: str, keep_names: bool, before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[tuple[Path, list[str]]] = []
    data_dir = tmp_path / "data"
    shutil.copytree(before, data_dir)
    with monkeypatch.context() as patch:
        power = Power(data_dir, patch)

        def point(*_: object) -> None:
            target = tmp_path / f"cut{len(cuts)}"
            power.cut(target, keep_names=keep_names)
            cuts.append((target, told(data_dir)))

        power.watch(point)
        upload(data_dir, way, point)
    assert len(cuts) > 40
    states = [check(target, answered) for target, answered in cuts]
    assert states[0] == "absent" and states[-1] == "ready"


@pytest.mark.parametrize("keep_names", [False, True], ids=["names lost", "names kept"])
def test_without_power_at_every_point_of_packing(
    keep_names: bool, before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed file that is there is whole, and one whose verdict was given is there."""
    base, data_dir = base_description(), tmp_path / "data"
    shutil.copytree(before, data_dir)
    files = json.dumps(make_config()).encode(), safetensors_bytes(make_tensors(base))
    digests = []
    for data in files:
        with BlobStore(data_dir).writer(1 << 20) as writer:
            writer.write(data)
            digests.append(writer.commit())
    job = IngestJob(job_id=1, config_digest=digests[0], weights_digest=digests[1], base=base)
    cuts: list[Path] = []
    with monkeypatch.context() as patch:
        power = Power(data_dir, patch)

        def point() -> None:
            cuts.append(tmp_path / f"cut{len(cuts)}")
            power.cut(cuts[-1], keep_names=keep_names)

        power.watch(point)
        assert not run(job, data_dir).problems
        point()
    found = []
    for target in cuts:
        pack.sweep(target)
        paths = list((target / "packed").glob("*")) if (target / "packed").exists() else []
        assert all(pack.verify_payload(pack.read_header(path)) for path in paths)
        found.append(len(paths))
    assert len(cuts) > 4 and found == sorted(found) and (found[0], found[-1]) == (0, 1)


def test_bytes_that_a_dead_server_left_are_synced_before_they_are_a_blob(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the file and perhaps not on the disk: nobody has synced them."""
    data_dir = tmp_path / "data"
    shutil.copytree(before, data_dir)
    server = Server(data_dir)
    made = asyncio.run(server.resumable.create("", len(WEIGHTS), sha(WEIGHTS)))
    server.close()
    with monkeypatch.context() as patch:
        power = Power(data_dir, patch)
        power.watch(lambda: None)
        (data_dir / "uploads" / made.id).write_bytes(WEIGHTS)
        server = Server(data_dir)
        asyncio.run(server.resumable.complete("", made.id))
        server.close()
        power.cut(tmp_path / "cut", keep_names=True)
    check(tmp_path / "cut", [f"blob {sha(WEIGHTS)}"])
    with pytest.raises(NotFound):
        server = Server(tmp_path / "cut")
        asyncio.run(server.resumable.show("", made.id))
