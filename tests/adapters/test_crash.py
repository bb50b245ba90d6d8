"""Killed at any moment of an upload, a data directory is whole: what was acknowledged is there,
what was not is absent or can be told to be unfinished, and nothing else has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.adapters.upload_child import CONFIG, WEIGHTS, upload

from loramux.adapters.blobs import BlobStore
from loramux.adapters.registry import Registry

ROOT = Path(__file__).parents[2]


def prepare(data_dir: Path) -> None:
    """A data directory with one adapter from before."""
    store, registry = BlobStore(data_dir), Registry(data_dir)
    digests = []
    for data in (b"{}", b"old weights"):
        with store.writer(100) as writer:
            writer.write(data)
            digests.append(writer.commit())
    row, _ = registry.create("old", config_digest=digests[0], weights_digest=digests[1])
    registry.mark_ready(row.id, fingerprint="base", report={})
    registry.close()


def check(data_dir: Path) -> str:
    """The state of the killed upload after a restart; sweeps what it left."""
    store, registry = BlobStore(data_dir), Registry(data_dir)
    store.sweep()
    assert not any((data_dir / "blobs" / "tmp").iterdir())
    rows = {row.name: row for row in registry.list()}
    assert rows["old"].status == "ready"
    for digest in store.digests():
        assert store.verify(digest), "a blob with a final name is whole"
        if not registry.uses_blob(digest):
            store.delete(digest)
    for row in rows.values():
        with store.open(row.config_digest) as config, store.open(row.weights_digest) as weights:
            if row.name == "new":
                assert config.read() == CONFIG and weights.read() == WEIGHTS
    registry.close()
    state = rows["new"].status if "new" in rows else "absent"
    if data_dir.with_suffix(".ready").exists():
        assert state == "ready", "an acknowledged adapter is there"
    return state


def test_killed_at_every_point_of_an_upload(tmp_path: Path) -> None:
    before, folder = tmp_path / "before", tmp_path / "killed"
    prepare(before)
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "tests.adapters.upload_child", str(before), str(folder)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"},
        check=True,
        timeout=120,
    )
    data_dirs = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: int(p.name))
    assert len(data_dirs) > 20
    states = [check(data_dir) for data_dir in data_dirs]
    order = ["absent", "validating", "ready"]
    assert set(states) == set(order)
    assert states == sorted(states, key=order.index), "each state is reached once and kept"
    for data_dir in data_dirs:
        upload(data_dir)  # the uploader tries again and gets what it wanted
        assert check(data_dir) == "ready"
