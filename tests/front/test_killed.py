"""A server that is killed at any moment of an adapter's life starts with what it had answered, with
the step it was at done or not begun, and with no file that nobody needs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from tests.front.life_child import upload
from tests.front.played import House
from tests.killing import told

from loramux.adapters.blobs import BlobStore

ROOT = Path(__file__).parents[2]
STATES = [
    set(),
    {(1, "ready", False)},
    {(1, "ready", True)},
    {(1, "ready", False), (2, "ready", True)},
    {(1, "ready", False), (2, "ready", False)},
    set(),
]
"""What the name means after so many answers: generation, status, pin."""


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_points_of_a_life(every: int, tmp_path: Path) -> None:
    """May take over ten seconds: each point is a process, and a start that checks what it left."""
    before, folder = tmp_path / "before", tmp_path / "killed"
    folder.mkdir()
    asyncio.run(make(before))
    subprocess.run(
        [sys.executable, "-m", "tests.front.life_child", str(before), str(folder), str(every)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}:{ROOT}"},
        check=True,
        timeout=600,
    )
    data_dirs = [path for path in folder.iterdir() if path.is_dir()]
    assert len(data_dirs) > 150 // every
    answered = [len(told(data_dir)) for data_dir in data_dirs]
    for data_dir, answers in zip(data_dirs, answered, strict=True):
        asyncio.run(check(data_dir, answers))
    assert every > 1 or set(answered) == set(range(len(STATES)))


async def make(data_dir: Path) -> None:
    house = House(data_dir)
    await house.start()
    await upload(house, "old", b"old")
    await house.stop()


async def check(data_dir: Path, answers: int) -> None:
    """After a restart the state is that of so many answers, or of one more."""
    house = House(data_dir)
    await house.start()
    service = house.service
    rows = service.shelf.registry.every()
    state = {(row.generation, row.status, row.pinned) for row in rows if row.name == "new"}
    assert state in STATES[answers : answers + 2], (data_dir.name, answers, state)
    assert service.resolve("old").generation == 1
    store = BlobStore(data_dir)
    files = {file for row in rows for file in (row.config_digest, row.weights_digest)}
    assert set(store.digests()) == files and all(map(store.verify, files))
    packed = {path.name[:64] for path in (data_dir / "packed").iterdir()}
    assert packed == {row.digest for row in rows}
    assert not any(store.temporary_dir.iterdir())
    assert house.engine.pins == {row.digest for row in rows if row.pinned}
    await house.stop()
